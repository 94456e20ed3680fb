# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch
from safetensors.torch import save_file

from optq.checkpoint import find_quantized_linears, pack, read_headers, reader_of
from optq.checkpoint.headers import TensorHeader
from optq.errors import CheckpointError
from optq.gptq import round_to_nearest
from optq.scheme import LayerScheme


def test_headers_tell_linears_and_bits(tmp_path):
    file = str(tmp_path / "model.safetensors")
    tensors = {"norm.weight": torch.ones(4)}
    for bits in (2, 3, 4, 8):
        weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(bits)) / 10
        packed = pack(round_to_nearest(weight, LayerScheme(bits=bits, group_size=32)))
        tensors |= {f"l{bits}.{part}": getattr(packed, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
    del tensors["l2.g_idx"]
    save_file(tensors, file)
    headers = read_headers([file])
    found = find_quantized_linears(headers)
    assert {name: linear.bits for name, linear in found.items()} == {"l2": 2, "l3": 3, "l4": 4, "l8": 8}
    assert all((linear.in_features, linear.out_features) == (96, 32) for linear in found.values())
    assert found["l3"].headers["scales"].dtype == torch.float16
    assert "g_idx" not in found["l2"].headers
    with reader_of(headers.values()) as read:
        assert torch.equal(read(headers["l3.qweight"]), tensors["l3.qweight"])


def header(*shape: int, dtype: torch.dtype = torch.int32) -> TensorHeader:
    return TensorHeader(shape=shape, dtype=dtype, name="a.b", file="model.safetensors")


HALF = torch.float16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qzeros": None}, "qzeros"),
        ({"qweight": None}, "qweight"),
        ({"qzeros": header(3, 5)}, "fit no GPTQ layout"),
        ({"qzeros": header(3)}, "fit no GPTQ layout"),
        ({"qweight": header(12, 64)}, "fit no GPTQ layout"),
        ({"qweight": header(0, 32)}, "fit no GPTQ layout"),
        ({"g_idx": header(95)}, "fit no GPTQ layout"),
        ({"scales": header(2, 32, dtype=HALF)}, "fit no GPTQ layout"),
        ({"scales": header(3, 0, dtype=HALF)}, "fit no GPTQ layout"),
        ({"bias": header(31, dtype=HALF)}, "fit no GPTQ layout"),
        ({"weight": header(32, 96, dtype=HALF)}, "a dense weight"),
        ({"qweight": header(12, 32, dtype=torch.int64)}, "qweight is of dtype int64"),
        ({"scales": header(3, 32)}, "scales is of dtype int32"),
        ({"g_idx": header(96, dtype=torch.bool)}, "g_idx is of dtype bool"),
        ({"bias": header(32)}, "bias is of dtype int32"),
    ],
)
def test_what_is_no_packed_linear_is_refused_by_name_and_file(changed, message):
    headers = {
        "qweight": header(12, 32),
        "qzeros": header(3, 4),
        "scales": header(3, 32, dtype=HALF),
        "g_idx": header(96),
    }
    assert find_quantized_linears({f"a.b.{part}": value for part, value in headers.items()})["a.b"].bits == 4
    headers = {part: value for part, value in {**headers, **changed}.items() if value is not None}
    with pytest.raises(CheckpointError, match=rf"a\.b.*{message}") as caught:
        find_quantized_linears({f"a.b.{part}": value for part, value in headers.items()})
    assert "model.safetensors" in str(caught.value)


def test_pickled_files_are_refused():
    with pytest.raises(CheckpointError, match="unpickling"):
        read_headers(["pytorch_model.bin"])


def test_a_tensor_in_two_files_is_refused_with_both(tmp_path):
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        save_file({"norm.weight": torch.ones(4)}, file)
    with pytest.raises(CheckpointError, match=r"norm\.weight is in two files.*a\.safetensors.*b\.safetensors"):
        read_headers(files)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file_is_refused_at_once(tmp_path):
    pipe, link, folder = (tmp_path / f"{name}.safetensors" for name in ("pipe", "link", "folder"))
    os.mkfifo(pipe)  # opening it would wait for ever
    link.symlink_to(link)
    folder.mkdir()
    for path in (pipe, link, folder):
        with pytest.raises(CheckpointError, match=rf"{path.name} is no file"):
            read_headers([str(path)])
