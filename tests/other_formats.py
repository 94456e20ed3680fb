# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in other tools' formats, written and read without optq: by numpy and Python's own integers."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from conftest import rewritten

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of a word's eight outputs each nibble holds, lowest first


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One matrix on its grid: codes (out, in), zeros and scales (out, groups), the group of each column (in,)."""

    bits: int
    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    def weight(self) -> torch.Tensor:
        values = self.codes.astype(np.float32) - self.zeros[:, self.groups].astype(np.float32)
        return torch.from_numpy(values * self.scales[:, self.groups].astype(np.float32))


def random_grid(shape, *, bits=4, group_size=32, symmetric=False, lowest_zero=1, seed=0) -> Grid:
    generator = np.random.default_rng(seed)
    (rows, columns), width = shape, shape[1] if group_size == -1 else group_size
    groups = -(-columns // width)
    zeros = generator.integers(lowest_zero, 2**bits, (rows, groups))
    return Grid(
        bits=bits,
        codes=generator.integers(0, 2**bits, shape),
        zeros=np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        scales=generator.uniform(0.001, 0.05, zeros.shape).astype(np.float16),
        groups=np.arange(columns) // width,
    )


def grids_of(folder: Path, **settings) -> dict[str, Grid]:
    """A random grid for every linear in the blocks of a dense llama."""
    weights = {name: tensor for name, tensor in tensors_of(folder).items() if name.endswith("_proj.weight")}
    return {
        name.removesuffix(".weight"): random_grid(tuple(tensor.shape), seed=seed, **settings)
        for seed, (name, tensor) in enumerate(weights.items())
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_folder(model: Path, folder: Path, packed: dict[str, torch.Tensor], stated: dict) -> Path:
    """`model` with the linears in `packed`, named by module and part, in place of its own."""
    shutil.copytree(model, folder)
    replaced = {name.rpartition(".")[0] for name in packed}
    tensors = {name: tensor for name, tensor in tensors_of(model).items() if name.rpartition(".")[0] not in replaced}
    save_file(tensors | packed, folder / "model.safetensors", metadata={"format": "pt"})
    with rewritten(folder / "config.json") as config:
        config["quantization_config"] = stated
    return folder


def awq_words(codes: np.ndarray) -> torch.Tensor:
    """(out, columns) as AWQ packs it: (columns, out / 8)."""
    words = np.zeros((codes.shape[1], codes.shape[0] // 8), dtype=np.uint32)
    for column in range(codes.shape[1]):
        for word in range(words.shape[1]):
            for nibble, output in enumerate(AWQ_ORDER):
                words[column, word] |= np.uint32(codes[8 * word + output, column]) << np.uint32(4 * nibble)
    return torch.from_numpy(words.view(np.int32))


def awq_parts(grid: Grid) -> dict[str, torch.Tensor]:
    return {
        "qweight": awq_words(grid.codes),
        "qzeros": awq_words(grid.zeros),
        "scales": torch.from_numpy(grid.scales.T.copy()),
    }


def awq_folder(model: Path, folder: Path, grids: dict[str, Grid], **stated) -> Path:
    packed = {f"{name}.{part}": tensor for name, grid in grids.items() for part, tensor in awq_parts(grid).items()}
    config = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    return write_folder(model, folder, packed, {**config, **stated})


def words_of(codes: np.ndarray, bits: int) -> torch.Tensor:
    """The inverse of `stream_of`, each row padded to whole words."""
    stream = (codes[:, :, None] >> np.arange(bits) & 1).reshape(codes.shape[0], -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def compressed_parts(grid: Grid, *, symmetric=False, dtype=torch.float16) -> dict[str, torch.Tensor]:
    parts = {
        "weight_packed": words_of(grid.codes, grid.bits),
        "weight_shape": torch.tensor(grid.codes.shape),
        "weight_scale": torch.from_numpy(grid.scales).to(dtype),
    }
    return parts if symmetric else parts | {"weight_zero_point": words_of(grid.zeros.T, grid.bits).T.contiguous()}


def compressed_folder(
    model: Path, folder: Path, parts: dict[str, dict[str, torch.Tensor]], weights: dict, **stated
) -> Path:
    """`weights` is the entry of that name of the only config group."""
    packed = {f"{name}.{part}": tensor for name, own in parts.items() for part, tensor in own.items()}
    group = {"targets": ["Linear"], "weights": {"type": "int", "strategy": "group", **weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return write_folder(model, folder, packed, {**config, "ignore": ["lm_head"], **stated})


def stream_of(words: torch.Tensor, bits: int) -> np.ndarray:
    """The codes of each row of int32 words, read as one stream of bits, the lowest first."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(words.shape[0], -1, bits) @ (1 << np.arange(bits))


def gptq_weight(tensors: dict[str, torch.Tensor], name: str, bits: int, offset: int) -> torch.Tensor:
    """(out, in); `offset` is what the checkpoint_format subtracts from zeros."""
    zeros = stream_of(tensors[f"{name}.qzeros"], bits).T + offset  # (out, groups)
    scales = tensors[f"{name}.scales"].numpy().T
    return Grid(
        bits=bits,
        codes=stream_of(tensors[f"{name}.qweight"].T.contiguous(), bits),
        zeros=zeros,
        scales=scales,
        groups=tensors[f"{name}.g_idx"].numpy(),
    ).weight()


def compressed_weight(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """(out, in)."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scales = tensors[f"{name}.weight_scale"].float().numpy()
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if f"{name}.weight_zero_point" in tensors:
        zeros = stream_of(tensors[f"{name}.weight_zero_point"].T.contiguous(), bits)[:, :rows].T
    return Grid(
        bits=bits,
        codes=stream_of(tensors[f"{name}.weight_packed"], bits)[:, :columns],
        zeros=zeros,
        scales=scales,
        groups=np.arange(columns) // (columns // scales.shape[1]),
    ).weight()
