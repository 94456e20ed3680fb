# SPDX-License-Identifier: Apache-2.0
"""The report says what runs left in their folders, and only that."""

import base64
import html
import json
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import optq
from conftest import interrupted_after, tiny_llama_config
from optq import GPTQConfig
from optq.checkpoint import find_quantized_linears, read_headers
from optq.errors import OutputError, QualityError, ReportError
from optq.events import LOG_NAME
from optq.report import page as page_module
from optq.report import read_run, report
from optq.version import how_to_install

pytest.importorskip("matplotlib", reason="reports need the package matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Texts of the cells and notes, pictures, and whether every tag is closed in its turn."""

    def __init__(self, file):
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.images, self.addresses, self.open = [], [], []
        self.rows, self.text = [], ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [value for key, value in attributes.items() if key in ("src", "href", "srcset", "data")]
        if tag == "img":
            self.images.append(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.text += data

    def row(self, first):
        (found,) = (row for row in self.rows if row[0] == first)
        return found


def config(rows, **settings):
    return GPTQConfig(**{"bits": 4, "group_size": 32, "dataset": rows, "effort": "fast", **settings})


def events(folder, kind):
    found = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


@pytest.fixture(scope="module")
def finished(tiny_llama, token_rows, tmp_path_factory):
    return optq.quantize(tiny_llama, config(token_rows), output_dir=tmp_path_factory.mktemp("runs") / "four-bits")


@pytest.fixture(scope="module")
def mixture(token_rows, tmp_path_factory):
    """A run with eight experts per layer and too few tokens for some of them."""
    torch.manual_seed(0)
    changes = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}
    shape = {**tiny_llama_config().to_dict(), **changes}
    kept = {key: value for key, value in shape.items() if key not in ("architectures", "model_type")}
    source = tmp_path_factory.mktemp("mixture")
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**kept)).save_pretrained(source)
    settings = config(token_rows[:3], quality_gate="off")
    return optq.quantize(source, settings, output_dir=tmp_path_factory.mktemp("runs") / "mixture")


def edited(folder, target, change):
    """A copy of a run's log with `change(events)` done to it."""
    lines = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    target.mkdir()
    (target / LOG_NAME).write_text("".join(json.dumps(event) + "\n" for event in change(lines)))
    return target


def test_a_finished_run_is_one_page_without_network_with_its_pictures(finished, tmp_path):
    made = report([finished], tmp_path / "report")
    page = Page(made.page)
    assert page.source.startswith("<!DOCTYPE html>") and not page.open
    assert [picture.name for picture in made.pictures] == ["run1-loss.png", "run1-time.png"]
    assert sorted(tmp_path.joinpath("report").iterdir()) == sorted([made.page, *made.pictures])
    embedded = [base64.b64decode(address.partition("base64,")[2]) for address in page.addresses]
    assert embedded == [picture.read_bytes() for picture in made.pictures]
    assert all(data.startswith(b"\x89PNG") for data in embedded)
    assert not re.search(r"https?:|@import|url\(", page.source)
    assert all(image["alt"] for image in page.images)


def test_what_is_returned_is_shown_in_a_few_lines(finished, tmp_path):
    found = report([finished], tmp_path)
    assert len(repr(found)) < 2000 and str(found.page) in repr(found)
    assert len(found.runs[0].events) > 10


def test_the_figures_on_the_page_are_those_of_the_checkpoint_and_the_log(finished, tmp_path):
    page = Page(report([finished], tmp_path).page)
    (quality,) = events(finished, "quality")
    assert f"perplexity is {quality['perplexity_ratio']:.3f} times" in page.text
    assert f"{read_run(finished).verdict.capitalize()}: on " in page.text
    worst = max(events(finished, "linear"), key=lambda event: event["relative_loss"])
    assert f"{worst['linear']} hurts most" in page.text
    assert (
        page.images[0]["alt"]
        .partition("The worst: ")[2]
        .startswith(f"{worst['linear'].removeprefix(worst['block'] + '.')} in {worst['block']},")
    )
    files = [str(file) for file in finished.glob("*.safetensors")]
    packed = find_quantized_linears(read_headers(files)).values()
    weights = sum(linear.in_features * linear.out_features for linear in packed)
    stored = weights * 4 + sum(16 * torch.Size(linear.headers["scales"].shape).numel() for linear in packed)
    stored += sum(32 * torch.Size(linear.headers["qzeros"].shape).numel() for linear in packed)
    assert f"{stored / weights:.2f}" in page.text.partition("bits per weight")[2][:20]
    assert page.row("group_size")[1] == "32"


def contrast(*colours):
    """The ratio of WCAG 2.2 between two colours, which are #rgb or #rrggbb."""
    luminances = []
    for colour in colours:
        digits = colour.lstrip("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_text_is_readable_on_light_and_dark_screens_and_the_page_is_as_wide_as_the_screen():
    source = Path(page_module.__file__).with_name("page.html").read_text(encoding="utf-8")
    assert 'name="viewport" content="width=device-width' in source
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", found)) for found in re.findall(r":root \{(.*?)\}", source))
    assert "@media screen and (prefers-color-scheme: dark)" in source
    assert light.keys() == dark.keys() and set(re.findall(r"var\(--(\w+)\)", source)) == light.keys()
    for scheme in (light, dark):
        for ground in ("page", "panel"):
            assert min(contrast(scheme["ink"], scheme[ground]), contrast(scheme["soft"], scheme[ground])) >= 4.5
    assert contrast(light["page"], dark["page"]) > 10
    assert contrast("#777", "#fff") < 4.5 < contrast("#767676", "#fff")  # as WCAG's examples have it


def drawn(monkeypatch, draw, *arguments):
    """The figure that `draw` would save."""
    kept = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file: kept.append(figure))
    draw(*arguments)
    (figure,) = kept
    return figure


def test_every_kind_of_linear_has_its_own_scale_in_the_heat_map(finished, tmp_path, monkeypatch):
    from optq.report.figures import draw_loss

    def scaled(kind, block, factor):
        def change(lines):
            for event in lines:
                if event["event"] == "linear" and re.search(f"{block}.*{kind}", event["linear"]):
                    event["relative_loss"] *= factor
            return lines

        log = edited(finished, tmp_path / f"{kind}{block}", change)
        axes = drawn(monkeypatch, draw_loss, read_run(log), tmp_path / "never").axes[1]
        return axes.images[0].get_array().data, [label.get_text() for label in axes.get_yticklabels()]

    (before, names), (after, renamed), (other, _) = (
        scaled(*asked) for asked in (("no", "", 1), ("v_proj", "", 9), ("v_proj", "layers.1", 9))
    )
    assert after == pytest.approx(before) and other != pytest.approx(before)
    assert [name.split()[0] for name, new in zip(names, renamed, strict=True) if name != new] == ["self_attn.v_proj"]


def test_how_a_linear_stands_in_its_kind_is_in_the_table(finished, tmp_path):
    run = read_run(finished)
    worst = max(run.linears, key=lambda linear: linear.relative_loss)
    kind = [linear.relative_loss for linear in run.linears if linear.kind == worst.kind]
    page = Page(report([finished], tmp_path).page)
    assert page.row(worst.linear)[2] == f"{worst.relative_loss / statistics.median(kind):.1f}"


def test_different_models_are_not_compared_on_one_axis(finished, tmp_path, monkeypatch):
    from optq.report.figures import draw_comparison

    def another(lines):
        lines[0]["model"] = "another/model"
        return lines

    runs = [read_run(finished), read_run(edited(finished, tmp_path / "log", another)), read_run(finished)]
    axes = drawn(monkeypatch, draw_comparison, runs, tmp_path / "never").axes
    assert [found.get_title(loc="left") for found in axes] == [runs[0].model, "another/model"]
    assert [[text.get_text() for text in found.texts] for found in axes] == [["1", "3"], ["2"]]


def test_a_log_that_says_otherwise_gives_another_page(finished, tmp_path):
    """Negative control."""

    def worse(lines):
        for event in lines:
            if event["event"] == "linear" and event["linear"] == "model.layers.1.self_attn.k_proj":
                event["relative_loss"] = 0.5
        return lines

    first = Page(report([finished], tmp_path / "first").page)
    other = Page(report([edited(finished, tmp_path / "log", worse)], tmp_path / "other").page)
    assert "model.layers.1.self_attn.k_proj hurts most: rounding changes 50 %" in other.text
    assert "model.layers.1.self_attn.k_proj hurts most" not in first.text
    assert other.images[0]["src"] != first.images[0]["src"]


def test_experts_are_counted_and_averaged(mixture, tmp_path):
    made = report([mixture], tmp_path)
    page = Page(made.page)
    assert "run1-experts.png" in [picture.name for picture in made.pictures]
    tokens = next(event["tokens"] for event in events(mixture, "starved_experts") if "layers.1" in event["block"])
    row = page.row("model.layers.1.mlp.experts")
    assert row[2:] == [
        str(min(tokens)),
        f"{sorted(tokens)[3] / 2 + sorted(tokens)[4] / 2:g}",
        str(max(tokens)),
        str(sum(count < 64 for count in tokens)),
        str(tokens.count(0)),
    ]
    assert "Some experts saw fewer tokens than they have inputs; their layer's mean" in page.text
    assert "mlp.experts.*.down_proj" in page.images[0]["alt"]
    assert "Finished, but not judged" in page.text


def test_bits_are_drawn_where_a_budget_mixed_them(tiny_llama, token_rows, tmp_path):
    folder = optq.quantize(
        tiny_llama, config(token_rows, target_bits_per_weight=4.5), output_dir=tmp_path / "budgeted"
    )
    made = report([folder], tmp_path / "report")
    assert "run1-bits.png" in [picture.name for picture in made.pictures]
    (allocated,) = events(folder, "allocated")
    assert made.runs[0].bits_per_weight == pytest.approx(allocated["bits_per_weight"], abs=1e-3)


def test_raised_damping_and_dead_inputs_are_said_and_drawn(finished, tmp_path):
    def trouble(lines):
        first, second = [event for event in lines if event["event"] == "linear"][:2]
        first["damping"], second["dead_columns"] = 10 * first["damping_asked"], 8
        return lines

    made = report([edited(finished, tmp_path / "log", trouble)], tmp_path / "report")
    assert {"run1-damping.png", "run1-dead-columns.png"} <= {picture.name for picture in made.pictures}
    text = Page(made.page).text
    assert "Damping was raised, because the Hessian was singular: model.layers.0.self_attn.q_proj." in text
    assert "always zero, and their weights rounded to nearest: model.layers.0.self_attn.k_proj." in text


def test_a_run_is_reported_while_it_is_interrupted_and_after_it_went_on(
    tiny_llama, token_rows, tmp_path, monkeypatch, finished
):
    output = tmp_path / "out"
    interrupted_after(1, monkeypatch, lambda: optq.quantize(tiny_llama, config(token_rows), output_dir=output))
    before = report([output], tmp_path / "before")
    assert "Failed after 0 of 2 blocks: KeyboardInterrupt" in Page(before.page).text
    assert [picture.name for picture in before.pictures] == ["run1-loss.png"]
    for inside in (output, output / "report"):
        with pytest.raises(OutputError, match=r"holds no finished checkpoint.*Name a folder outside"):
            report([output], inside)
    assert not (output / "report").exists()
    optq.quantize(tiny_llama, config(token_rows), output_dir=output)
    after = report([output], output / "report")
    assert "The run was interrupted and went on; 1 block was done by then." in Page(after.page).text
    whole = report([finished], tmp_path / "whole")
    assert [linear.relative_loss for linear in after.runs[0].linears] == [
        linear.relative_loss for linear in whole.runs[0].linears
    ]


def test_a_log_without_end_is_reported_as_far_as_it_goes(finished, tmp_path):
    log = tmp_path / "killed" / LOG_NAME
    log.parent.mkdir()
    text = (finished / LOG_NAME).read_text()
    log.write_text(text[: text.index('"event": "block"') + 200])  # in the middle of the second block, and of a line
    made = report([log.parent], tmp_path / "report")
    assert "Not finished: the log ends after 1 of 2 blocks." in Page(made.page).text
    assert made.runs[0].size_gib is None
    assert made.runs[0].blocks[0] == "model.layers.0"


def test_another_run_in_the_same_folder_is_not_mixed_with_the_failed_one(finished, tmp_path):
    def failed_before(lines):
        first = [event for event in lines if event["event"] in ("started", "linear")][:4]
        return [*first, {"event": "failed", "at_seconds": 9.0, "error": "OSError: full"}, *lines]

    made = report([edited(finished, tmp_path / "log", failed_before)], tmp_path / "report")
    assert len(made.runs[0].linears) == 14
    assert "The limit is a perplexity ratio of 1.25." in Page(made.page).text


def test_a_red_gate_is_said(tiny_llama, token_rows, tmp_path):
    settings = config(token_rows, quality_gate="raise", max_perplexity_ratio=0.01)
    with pytest.raises(QualityError):
        optq.quantize(tiny_llama, settings, output_dir=tmp_path / "out")
    text = Page(report([tmp_path / "out"], tmp_path / "report").page).text
    assert "The limit is a perplexity ratio of 0.01." in text


def test_several_runs_are_compared(tiny_llama, finished, token_rows, tmp_path):
    three = optq.quantize(tiny_llama, config(token_rows, bits=3), output_dir=tmp_path / "three-bits")
    made = report([finished, three], tmp_path / "report")
    page = Page(made.page)
    assert made.pictures[-1].name == "comparison.png"
    first, second = page.row("1. four-bits"), page.row("2. three-bits")
    assert float(first[2]) - float(second[2]) == pytest.approx(1, abs=0.05)  # bits, and those of the zeros
    assert float(first[4]) < float(second[4])
    assert "their figures are not measured on the same tokens" not in page.text

    def other_data(lines):
        lines[0]["calibration"]["sha256"] = "0"
        return lines

    other = edited(finished, tmp_path / "other", other_data)
    assert "not measured on the same tokens" in Page(report([finished, other], tmp_path / "report").page).text


def test_names_are_escaped(finished, tmp_path):
    hostile = "<img src=x onerror=alert(1)>&$^{2}$"

    def named(lines):
        lines[0]["model"] = hostile
        return json.loads(json.dumps(lines).replace("self_attn.q_proj", hostile))

    folder = edited(finished, tmp_path / hostile, named)
    for runs in ([folder], [folder, folder]):
        page = Page(report(runs, tmp_path / "report").page)
        assert hostile not in page.source
        assert html.escape(hostile) in page.source
        assert all(image["src"].startswith("data:") for image in page.images)


def test_what_is_no_run_is_refused_with_a_reason(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match=rf"holds no {LOG_NAME}.*Name the output_dir"):
        report([tmp_path / "empty"], tmp_path / "report")
    with pytest.raises(ReportError, match="of no run"):
        report([], tmp_path / "report")
    damaged = edited(finished, tmp_path / "damaged", lambda lines: [*lines[:2], 3, *lines[2:]])
    with pytest.raises(ReportError, match=r"line 3 is no event of a run"):
        report([damaged], tmp_path / "report")
    idle = edited(finished, tmp_path / "idle", lambda lines: [{**lines[-1], "event": "failed", "error": "OSError"}])
    with pytest.raises(ReportError, match="ended before it started on the model's blocks"):
        report([idle], tmp_path / "report")

    def former_version(lines):
        return [{key: value for key, value in event.items() if key != "stored_bits"} for event in lines]

    with pytest.raises(ReportError, match=r"no 'stored_bits', so another version of optq wrote it"):
        report([edited(finished, tmp_path / "former", former_version)], tmp_path / "report")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="could not be written"):
        report([finished], tmp_path / "file")
    assert not (tmp_path / "report").exists()


def test_without_matplotlib_the_package_to_install_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "optq.report.figures", raising=False)
    monkeypatch.delattr("optq.report.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match=re.escape(f"needs the package matplotlib: {how_to_install('report')}")):
        report([finished], tmp_path)


FRAMES = """<!DOCTYPE html><body><script>
const pages = PAGES, widths = [1280, 500, 400];
for (const [name, source] of Object.entries(pages)) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
  frame.srcdoc = source;
  frame.onload = () => {
    const root = frame.contentDocument.scrollingElement;
    const line = document.createElement("output");
    line.textContent = `${name} ${width}: ${root.scrollWidth} of ${root.clientWidth}`;
    document.body.append(line);
  };
  document.body.append(frame);
}
</script></body>"""


def browse(address, *options):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", *options]
    return subprocess.run([*command, address], check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser_nothing_overflows_on_a_screen_or_a_phone_and_dark_is_dark(finished, mixture, tmp_path):
    from PIL import Image

    page = report([finished, mixture], tmp_path).page
    source = page.read_text()
    frames = tmp_path / "frames.html"
    pages = {"page": source, "control": source.replace("</h1>", "</h1><div style='width: 90rem'>wide</div>", 1)}
    frames.write_text(FRAMES.replace("PAGES", json.dumps(pages).replace("</", "<\\/")))
    found = re.findall(
        r"(\w+) (\d+): (\d+) of (\d+)", browse(frames.as_uri(), "--dump-dom").rpartition("</script>")[2]
    )
    measured = {(name, int(width)): (int(content), int(window)) for name, width, content, window in found}
    assert measured.keys() == {(name, width) for name in pages for width in (1280, 500, 400)}
    for (name, _), (content, window) in measured.items():
        assert (content <= window) == (name == "page")
    corners = set()
    for scheme in (0, 1):  # Chromium's numbers of dark and light
        file = tmp_path / f"{scheme}.png"
        asked = f"--blink-settings=preferredColorScheme={scheme}"
        browse(page.as_uri(), asked, f"--screenshot={file}", "--window-size=1280,2000")
        with Image.open(file) as image:
            screen = image.convert("RGB")
        assert len(screen.getcolors(1 << 24)) > 100  # the pictures are there
        corners.add(screen.getpixel((2, 2)))
    assert corners == {(0x15, 0x18, 0x1C), (255, 255, 255)}
