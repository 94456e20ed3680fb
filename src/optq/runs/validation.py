# SPDX-License-Identifier: Apache-2.0
"""What can be refused before a weight is read, in one place: for `optq.plan`, `optq.quantize` and `from_pretrained`.

Whatever is found missing only after the last block costs all the work before it.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from optq.calibration import check_sources
from optq.checkpoint import CHECKPOINT_FORMATS, PackedWeight, pack_codes
from optq.config.field import short
from optq.config.gptq import GPTQConfig
from optq.device.placement import devices_here, execution_device
from optq.errors import ConfigError, KernelError
from optq.kernels import choose_kernel
from optq.model import LinearView
from optq.quantization.plan import Plan
from optq.scheme import LayerScheme, trivial_groups

from .trackers import trackers_of

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of device_map with which transformers chooses among the devices that are there."""


DTYPES = ("float32", "bfloat16", "float16")
"""What a model may be loaded in to be quantized, but for "auto": as it is stored."""


def check_dtype(dtype: Any) -> None:
    """Refuse a `dtype=` of from_pretrained in which no model is computed.

    Raises:
        ConfigError: it is named.
    """
    for each in dtype.values() if isinstance(dtype, Mapping) else (dtype,):
        if each is not None and each != "auto" and str(each).removeprefix("torch.") not in DTYPES:
            raise ConfigError(
                f"dtype={dtype!r} was asked for, in which no model is loaded to be quantized; it may be "
                f"{', '.join(DTYPES)} or auto: as it is stored. How many bits the weights get is told by bits=."
            )


def check_request(
    config: GPTQConfig,
    device_map: Any = None,
    offload_folder: str | os.PathLike[str] | None = None,
    output: Path | None = None,
) -> None:
    """Refuse what needs no model to be refused.

    Args:
        device_map, offload_folder: as of `from_pretrained`.
        output: a folder that is going to be made.
    Raises:
        ConfigError, CalibrationError, KernelError: one that names the argument.
    """
    config.post_init()  # fields may have been assigned since
    check_sources(config.calibration_data)
    execution_device(config.device)
    _check_written(config)
    _check_log_file(config.log_file, output)
    trackers_of(config.report_to)
    _check_devices(device_map)
    if "disk" in _places(device_map) and offload_folder is not None:
        _check_folder("offload_folder", Path(offload_folder))


def check_placement(
    model: Any, plan: Plan, device_map: Any, offload_folder: str | os.PathLike[str] | None = None
) -> None:
    """Refuse a device_map that leaves something of the quantized model without a place.

    Args:
        model: as it is before quantizing; may be on the meta device.
    Raises:
        ConfigError: it does, or the disk has no folder.
    """
    if not isinstance(device_map, Mapping):
        return
    _check_devices({key: place for key, place in device_map.items() if place != "disk"})
    _check_covered(model, plan, device_map)
    if "disk" in _places(device_map) and offload_folder is None:
        raise ConfigError(
            f"device_map places {', '.join(key for key in device_map if device_map[key] == 'disk')} on the disk, but "
            "there is no folder for it. Pass offload_folder= as well."
        )


def check_kernels(model: Any, plan: Plan, config: GPTQConfig, device_map: Any, *, placed: bool) -> None:
    """Refuse a kernel by name that will not run every linear that is going to be packed.

    Args:
        model: as it is before quantizing; may be on the meta device.
        placed: the model is going to run here, wherever device_map places it, by default on the CPU; else it is going
            to be written, and any device of this machine will do.
    Raises:
        KernelError: the table's reasons.
    """
    if config.backend == "auto":
        return
    devices = [torch.device(_device_name(place)) for place in _places(device_map) if place != "disk"]
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        devices = [execution_device()]
    anywhere = not devices and not placed
    devices = devices or [torch.device("cpu")]
    if anywhere:
        devices.append(execution_device())
    kinds: dict[tuple[int, int, LayerScheme], str] = {}
    for target in plan.all_targets:
        for scheme in _schemes(config, target.view, target.scheme):
            kinds.setdefault((*target.view.shape, scheme), target.view.name)
    for (out_features, in_features, scheme), name in kinds.items():
        refused = []
        for device in dict.fromkeys(devices):
            with torch.device("cpu"):  # transformers calls us inside torch.device("meta")
                packed = _stand_in(out_features, in_features, scheme, config, device)
                try:
                    choose_kernel(packed, model.dtype, config.backend)
                except KernelError as error:
                    refused.append(error)
        if refused and (not anywhere or len(refused) == len({*devices})):
            raise KernelError(f"{name}: {refused[0]}") from refused[0]


def _check_written(config: GPTQConfig) -> None:
    """Refuse what config.json cannot hold: it is written last."""
    for key, value in config.written().items():
        try:
            json.dumps(value, sort_keys=True, allow_nan=False)
            _check_keys(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{key}={short(value)} was asked for, which config.json cannot hold: {error}. Allowed are what JSON "
                "has: text, finite numbers, true, false, null, and lists and dicts of these with text as keys."
            ) from error


def _check_keys(value: Any) -> None:
    """Refuse keys that JSON would turn into text, or that cannot be sorted beside text."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is a key and no text")
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for part in value:
        _check_keys(part)


def _check_log_file(log_file: str | os.PathLike[str] | None, output: Path | None) -> None:
    if log_file is None:
        return
    path = Path(log_file)
    try:
        path.absolute().lstat()
    except (FileNotFoundError, NotADirectoryError):  # nothing yet; or no folder to put it into, as is said below
        pass
    except (OSError, ValueError) as error:  # no file can have that name
        raise ConfigError(f"log_file={short(str(path))} cannot be written: {error}.") from error
    if path.is_dir():
        raise ConfigError(f"log_file={str(path)!r} is a folder; name a file in it.")
    if path.is_fifo():
        raise ConfigError(f"log_file={str(path)!r} is a pipe, in which nothing can be looked up; name a file.")
    if output is not None and path.parent.absolute() == output.absolute() and not output.exists():
        return
    if not path.parent.is_dir():
        raise ConfigError(f"log_file={str(path)!r} cannot be written: there is no folder {str(path.parent)!r}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"log_file={str(path)!r} cannot be written: no permission to.")


def _check_folder(argument: str, folder: Path) -> None:
    """Refuse a folder that is not there and cannot be made."""
    ancestor = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        found = "is no folder" if not ancestor.is_dir() else "cannot be written to"
        raise ConfigError(f"{argument}={str(folder)!r} cannot be used: {str(ancestor)!r} {found}.")


def _places(device_map: Any) -> list[Any]:
    """The values of a device_map in any of its forms."""
    if device_map is None or (isinstance(device_map, str) and device_map in AUTOMATIC):
        return []
    return list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]


def _check_devices(device_map: Any) -> None:
    here = devices_here()
    for place in _places(device_map):
        if place == "disk" and isinstance(device_map, Mapping) and set(_places(device_map)) != {"disk"}:
            continue
        if _device_name(place) not in here:
            raise ConfigError(
                f"device_map={device_map!r} was asked for, which places the model on {place!r}; this machine has "
                f"{', '.join(here)}. device_map may be one of these, {', '.join(map(repr, AUTOMATIC))}, or a dict of "
                "modules with such devices, or 'disk' for those that find no room."
            )


def _device_name(place: Any) -> str:
    """A device as `devices_here` writes it; transformers also takes numbers of accelerators."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if isinstance(place, int) and not isinstance(place, bool):
        return f"{accelerator.type if accelerator is not None else 'accelerator'}:{place}"
    return "cpu" if str(place) == "cpu:0" else str(place)


def _check_covered(model: Any, plan: Plan, device_map: Mapping[str, Any]) -> None:
    """Refuse a device_map that accelerate would refuse for the quantized model."""
    quantized = {target.view.name for target in plan.all_targets}
    names = {name for name in model.state_dict() if name.rpartition(".")[0] not in quantized}
    names |= {f"{name}.qweight" for name in quantized}
    homeless = sorted(
        name for name in names if not any(not key or f"{name}.".startswith(f"{key}.") for key in device_map)
    )
    if homeless:
        raise ConfigError(
            f"device_map gives no place to {', '.join(homeless[:3])}{' …' * (len(homeless) > 3)}. Name its module, or "
            "add '' for all that is not named. Of a quantized linear only the module can be named, not its weight."
        )


def _schemes(config: GPTQConfig, view: LinearView, planned: LayerScheme) -> Iterable[LayerScheme]:
    """All schemes that a linear may get."""
    return config.candidates_for(view.name, *view.shape) if config.has_budget else (planned,)


def _stand_in(
    out_features: int, in_features: int, scheme: LayerScheme, config: GPTQConfig, device: torch.device
) -> PackedWeight:
    """A packed weight such as this linear will have, but for the codes, which take no memory."""
    groups = scheme.group_count(in_features)
    group_of_column = trivial_groups(in_features, scheme.group_width(in_features))
    if scheme.act_order == "desc_act":
        group_of_column = group_of_column.flip(0)
    middle = 2 ** (scheme.bits - 1)  # an asymmetric grid has another zero somewhere
    zeros = torch.full((out_features, groups), middle if scheme.symmetric else middle - 1)
    zeros -= CHECKPOINT_FORMATS[config.format]
    words = torch.zeros((), dtype=torch.int32, device=device)
    return PackedWeight(
        qweight=words.expand(in_features * scheme.bits // 32, out_features),
        qzeros=pack_codes(zeros, scheme.bits).T.contiguous().to(device),
        scales=torch.full((), 0.01, dtype=torch.float16, device=device).expand(groups, out_features),
        g_idx=group_of_column.to(device),
        bits=scheme.bits,
        checkpoint_format=config.format,
    )
