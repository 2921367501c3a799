"""Everything a user can cause ends in one of these; the text says what was seen, what was expected and what to do."""


class KTError(ValueError):
    """A refusal that is complete in its one sentence: no traceback is needed to act on it."""


class ConfigError(KTError):
    """A flag or a combination of flags that cannot work."""


class GGUFError(KTError):
    """The GGUF file is missing, damaged, incomplete or does not fit the model."""


class HubError(KTError):
    """A repository of the Hugging Face hub is not there, does not have what is asked, or cannot be reached."""


class ResourceError(KTError):
    """The machine lacks memory, cores or an instruction set."""
