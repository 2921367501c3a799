"""--kt-gguf org/repo:Q4_K_M: finds one model among a hub repository's files and downloads it, through huggingface_hub.

That library brings progress bars, cache, tokens and the HF_* variables; a file whose connection breaks is resumed where
it broke, and a later start takes complete files from the cache, also without a network.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import HfApi, constants, errors

from kt_vllm.errors import HubError
from kt_vllm.gguf.reader import SHARD, is_model, listed
from kt_vllm.log import init_logger

logger = init_logger(__name__)

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<wanted>[^:]*))?", re.ASCII)
# How the files on the hub are called: "Model-UD-Q2_K_XL", "model.IQ4_XS", "Model-Q4_K_M-imat", "model-bf16".
_QUANTISATION = re.compile(
    r"(?<![^-._/ ])(?:UD-)?(?:I?Q\d|TQ\d|(?:MX|NV)FP4|BF16|F16|F32|FP16|FP32)[A-Z0-9_]*(?![^-./ ])", re.IGNORECASE
)
# huggingface_hub 1.x and 2.x raise what their HTTP library does where there is no connection; all of it has one base.
_UNREACHABLE: tuple[type[BaseException], ...] = (OSError, errors.HfHubHTTPError.__mro__[1])
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)

_T = TypeVar("_T")


@dataclass(frozen=True)
class HubModel:
    """The files of one model in a repository: names in order of their shards, and their bytes together."""

    repo: str
    revision: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]


def is_hub_name(gguf: str) -> bool:
    """Whether it is the name of a repository. What exists here is a path, and so is what looks like one."""
    if gguf.startswith(("/", "./", "../", "~")) or os.path.exists(gguf):
        return False
    match = _NAME.fullmatch(gguf)
    return match is not None and not (match["wanted"] is None and gguf.endswith(".gguf"))


def resolve(gguf: str, cache_dir: str | None = None, token: bool | str | None = None) -> str:
    """The path of the model `gguf` names, downloaded if need be: itself where it is a path, else the first shard.

    cache_dir: None for huggingface_hub's own. Raises HubError.
    """
    return download(find(gguf, cache_dir, token), cache_dir, token) if is_hub_name(gguf) else gguf


@lru_cache(maxsize=8)
def find(gguf: str, cache_dir: str | None = None, token: bool | str | None = None) -> HubModel:
    """The files that `org/repo:Q4_K_M` means. Downloads nothing. Raises HubError, naming what there is."""
    match = _NAME.fullmatch(gguf)
    if match is None:
        raise HubError(f"--kt-gguf is {gguf!r}: give a path, or the name of a hub repository as org/repo:Q4_K_M")
    repo = match["repo"]
    try:
        info = _asked(repo, api(token), lambda hub: hub.model_info(repo, files_metadata=True))
        revision = info.sha or "main"
        files = {f.rfilename: f.size or 0 for f in info.siblings or ()}
    except _NoNetworkError as error:
        revision, files = _cached(repo, cache_dir)
        if not files:
            raise HubError(f"{error}, and {repo!r} is not in the cache: connect, or give the path of a file") from None
        logger.warning("kt_vllm: %s; taking %r from the cache.", error, repo)
    names = _choose(repo, match["wanted"], list(files))
    return HubModel(repo, revision, names, tuple(files[name] for name in names))


def download(model: HubModel, cache_dir: str | None = None, token: bool | str | None = None) -> str:
    """Brings what is not in the cache yet, one file after another; the path of the first. Raises HubError.

    Not all at once, with huggingface_hub's own threads: they would keep a Ctrl-C waiting until their files are done.
    """
    there = {n: huggingface_hub.try_to_load_from_cache(model.repo, n, cache_dir, model.revision) for n in model.names}
    missing = [n for n, path in there.items() if not isinstance(path, str)]
    nbytes = sum(size for name, size in zip(model.names, model.sizes, strict=True) if name in missing)
    _check_disk(model.repo, nbytes, Path(cache_dir or constants.HF_HUB_CACHE))
    if missing:
        logger.info("kt_vllm: downloading %d files (%.1f GB) of %s", len(missing), nbytes / 1e9, model.repo)
    for name in missing:

        def fetch(hub: HfApi, name: str = name) -> str:
            return hub.hf_hub_download(model.repo, name, revision=model.revision, cache_dir=cache_dir)

        try:
            there[name] = _asked(model.repo, api(token), fetch)
        except _NoNetworkError as error:
            raise HubError(
                f"{error} while {name!r} of {model.repo!r} was downloaded: start again; complete files are kept"
            ) from None
    return os.path.abspath(str(there[model.names[0]]))


def fetch_config(repo: str, revision: str | None = None, token: bool | str | None = None) -> Path | None:
    """The downloaded config.json of a model that is named by its repository; None where `repo` is no such name.

    Raises HubError, of one sentence, where vLLM itself would take many more words.
    """
    if not is_hub_name(repo) or ":" in repo:
        return None

    def fetch(hub: HfApi) -> str:
        return hub.hf_hub_download(repo, "config.json", revision=revision)

    try:
        return Path(_asked(repo, api(token), fetch, "config.json"))
    except _NoNetworkError as error:
        raise HubError(
            f"{error}, and config.json of {repo!r} is not in the cache: connect, or give a model folder"
        ) from None


class _NoNetworkError(Exception):
    """The hub gave no answer; the text says why."""


def api(token: bool | str | None) -> HfApi:
    """The hub that HF_ENDPOINT names."""
    return HfApi(token=token)


def _asked(repo: str, api: HfApi, call: Callable[[HfApi], _T], file: str = "such file any more") -> _T:
    """call(api), which asks for `file`, its errors in our words."""
    hub = api.endpoint
    try:
        return call(api)
    except errors.GatedRepoError:
        raise HubError(
            f"the hub repository {repo!r} is gated: accept its terms at {hub}/{repo}, and log in with `hf auth login` "
            "or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"{repo!r} is neither a path here nor a repository of {hub}: check the name; if it is private, log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from None
    except errors.HFValidationError:
        raise HubError(f"{repo!r} is neither a path here nor a name a hub repository can have: check it") from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.HfHubHTTPError):
            raise HubError(f"the hub repository {repo!r} has no {file}: give one that has") from None
        raise _NoNetworkError(f"{hub} cannot be reached") from None
    except errors.OfflineModeIsEnabled:
        raise _NoNetworkError("HF_HUB_OFFLINE is set") from None
    except errors.HfHubHTTPError as error:
        raise _NoNetworkError(f"{hub} answered with status {error.response.status_code}") from None
    except _UNREACHABLE as error:
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
            raise HubError(
                f"{repo!r} cannot be stored ({os.strerror(error.errno)}): make room there, or choose another place "
                "with --download-dir or HF_HOME"
            ) from None
        raise _NoNetworkError(f"the connection to {hub} failed ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _cached(repo: str, cache_dir: str | None) -> tuple[str, dict[str, int]]:
    """The newest revision of `repo` in the cache: its name, and its files with their sizes."""
    try:
        repos = huggingface_hub.scan_cache_dir(cache_dir).repos
    except (errors.CacheNotFound, ValueError):
        return "", {}
    revisions = [r for found in repos if (found.repo_type, found.repo_id) == ("model", repo) for r in found.revisions]
    if not revisions:
        return "", {}
    newest = max(revisions, key=lambda r: r.last_modified)
    root = newest.snapshot_path
    return newest.commit_hash, {f.file_path.relative_to(root).as_posix(): f.size_on_disk for f in newest.files}


def _choose(repo: str, wanted: str | None, files: list[str]) -> tuple[str, ...]:
    """The shards of the one model that `wanted` names: a quantisation, a file, or None where there is but one."""
    models: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(files):
        outside = name.startswith("/") or ".." in name.split("/")  # of the cache, if a hub were hostile
        if is_model(name) and not outside:
            match = SHARD.fullmatch(name)
            key, number = ((match["stem"], int(match["count"])), int(match["number"])) if match else ((name, 1), 1)
            models.setdefault(key, {})[number] = name
    if not models:
        raise HubError(f"the hub repository {repo!r} has no .gguf file of a model: give one that has")
    labels = {key: _label(key[0]) for key in models}
    listing = listed(sorted(dict.fromkeys(labels.values())), 40)
    if wanted is None:
        found = list(models)
    else:
        found = [key for key, shards in models.items() if wanted in shards.values()]
        # "Q2_K_XL" means UD-Q2_K_XL where there is no other.
        for same in (lambda a: a, lambda a: a.removeprefix("ud-")):
            found = found or [key for key, label in labels.items() if same(label.lower()) == wanted.lower()]
    if not found:
        raise HubError(
            f"the hub repository {repo!r} has no quantisation {wanted!r}: give {repo}:NAME with one of {listing}"
        )
    if len(found) > 1 and wanted is None:
        raise HubError(f"the hub repository {repo!r} has {len(found)} models: give {repo}:NAME with one of {listing}")
    if len(found) > 1:
        firsts = listed([models[key][min(models[key])] for key in found])
        raise HubError(
            f"the hub repository {repo!r} has {len(found)} models that {wanted!r} may mean ({firsts}): give "
            f"{repo}:FILE with one of them"
        )
    return _in_order(repo, found[0][1], models[found[0]])


def _in_order(repo: str, count: int, shards: Mapping[int, str]) -> tuple[str, ...]:
    missing = [number for number in range(1, count + 1) if number not in shards]
    if missing:
        raise HubError(
            f"{repo!r} has {len(shards)} of the {count} shards of {shards[min(shards)]!r}, and number {missing[0]} is "
            "missing: choose another quantisation, or another repository"
        )
    return tuple(shards[number] for number in range(1, count + 1))


def _label(stem: str) -> str:
    """The quantisation in a file's name, or in its folder's; without one, the file's name."""
    folder, name = os.path.split(stem.removesuffix(".gguf"))
    for text in (name, folder):
        found: list[Any] = _QUANTISATION.findall(text)
        if found:
            return found[-1]
    return name


def _check_disk(repo: str, nbytes: int, folder: Path) -> None:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise HubError(
            f"{repo!r} needs {nbytes / 1e9:.1f} GB on the disk of {str(folder)!r}, which has {free / 1e9:.1f} GB left: "
            "make room, or choose another place with --download-dir or HF_HOME"
        )
