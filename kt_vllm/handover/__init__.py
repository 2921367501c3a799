"""From the device to the executor and back, inside vLLM's CUDA graphs.

Both sides write flags into pinned host memory (csrc/handover/mailbox.h). A token's way: layer.py calls
DeviceLayerHandle (device_layer.py), which moves tensors through the pinned buffers of staging.py in one of two ways
(ways.py): by small kernels that raise and await the flags (kernels.py) or, where the device cannot, by host functions.
The coordinator (csrc/handover) answers.
"""
