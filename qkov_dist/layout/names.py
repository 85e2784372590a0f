"""Names of modules and parameters in the plain model, whatever is wrapped around it or around modules of it.

Nothing heavy is loaded here: what only reads files asks for names too.
"""

from __future__ import annotations

WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module")  # names that a wrapper puts in a path
_AROUND_ALL = ("module.", "base_model.model.")  # data parallelism; PEFT
_INSIDE = ("base_layer", "original_module", "modules_to_save")  # what PEFT puts between a module and its own


def without_wrappers(path: str) -> str:
    """A path as it was before activation checkpointing, ``torch.compile`` or FSDP1 wrapped modules on it."""
    return ".".join(name for name in path.split(".") if name not in WRAPPERS)


def plain_name(path: str) -> str:
    """A path as it is in the plain model: without these wrappers, and as it was before PEFT."""
    path = without_wrappers(path)
    for prefix in _AROUND_ALL:
        path = path.removeprefix(prefix)
    names = path.split(".")
    after_saved = ("", *names)  # in ``modules_to_save.default`` the second name is the adapter's
    return ".".join(
        name
        for name, before in zip(names, after_saved, strict=False)
        if name not in _INSIDE and before != "modules_to_save"
    )
