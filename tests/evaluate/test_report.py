"""The report of whole, partial and empty run directories: the same numbers in HTML, Markdown and JSON."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from keras_gemma_ft import cli
from keras_gemma_ft.config import config_from
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate import evaluate_models
from keras_gemma_ft.evaluate.plots import reliability
from keras_gemma_ft.evaluate.report import difference, write_report
from keras_gemma_ft.evaluate.run_record import read_run

INJECTION = "<script>alert(1)</script> & | $x$"


class Fake:
    def __init__(self, right, loss):
        self.right, self.loss = right, loss

    def generate(self, prompts, max_new_tokens):
        rows = range(len(prompts))
        return [("ab"[n % 2] if n % 10 < self.right else ["b", "a", INJECTION, ""][n % 4]) for n in rows]

    def score(self, conversations):
        tokens = np.full(len(conversations), 4)
        return self.loss * tokens * np.linspace(0.5, 1.5, len(conversations)), tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("my <run>")
    rows = [
        Conversation(
            [
                {"role": "user", "content": f"{'word ' * (n % 30)}{INJECTION}"},
                {"role": "model", "content": "ab"[n % 2]},
            ],
            f"test.jsonl:{n + 1}",
        )
        for n in range(60)
    ]
    evaluation = evaluate_models(Fake(8, 0.3), rows, base=Fake(3, 1.5), calibrate=True)
    forgetting = {
        "verdict": "forgetting",
        "reason": "the loss rose",
        "source": "general.jsonl",
        "rows": 60,
        "metrics": evaluation.to_json()["metrics"][:2],
    }
    evaluation.save(directory, forgetting=forgetting)
    records = []
    for step in range(1, 101):
        records.append(
            {"step": step, "loss": 2.0 / step, "learning_rate": 1e-4, "tokens_per_second": 100.0 + step}
        )
        if step % 20 == 0:
            records.append({"step": step, "eval_loss": 1.0 + 0.001 * (step - 60) ** 2 / 10})
            kind = "healthy" if step < 80 else "overfitting"
            records.append(
                {"step": step, "verdict": kind, "reason": f"because {step}", "evidence": {}, "remedies": []}
            )
    group = {"name": "local/q_proj", "parameters": 123456, "gradient_norm": 0.5, "update_norm": None}
    records.append({"step": 1, "audit": {"loss": 2.0, "supervised_tokens": 9, "groups": [group]}})
    for step, answer in ((0, "<nothing much>"), (60, "in between"), (100, "card arrival")):
        sample = {"prompt": f"where is it {INJECTION}", "expected": "card_arrival", "answer": answer}
        records.append({"step": step, "samples": [sample]})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "config.json").write_text(json.dumps({"preset": "tiny|x", "lora": {"rank": 16}}))
    (directory / "manifest.json").write_text(
        json.dumps({"data": {"rows": 12345}, "environment": {"jax": "0.10.2"}, "cost": {"seconds": 61.5}})
    )
    write_report(directory, advice=["train.epochs: try 2."])
    return directory


class Page(HTMLParser):
    """Text, tags and ids of a page; checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.ids, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_is_whole_and_self_contained(run):
    source = (run / "report.html").read_text()
    page = Page(source)
    assert len(page.ids) == len(set(page.ids))  # figures do not share ids
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png"))
    assert not re.search(r"url\((?!#)", source)
    figures = [attributes["aria-label"].split(":")[0] for tag, attributes in page.tags if tag == "figure"]
    assert figures == [
        "Loss",
        "Learning rate",
        "Throughput",
        "Confusion matrix",
        "Length against error",
        "Calibration",
    ]
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        ElementTree.fromstring(svg)
    assert (
        "healthy" in source[source.index("<svg") :].split("</svg>")[0]
    )  # the verdict is drawn where it was given


def test_what_users_wrote_is_text_and_never_markup(run):
    page = Page((run / "report.html").read_text())
    assert INJECTION in page.text
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_three_reports_hold_the_same_numbers(run):
    numbers = json.loads((run / "metrics.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert numbers["metrics"] == evaluation["metrics"]
    accuracy = next(metric for metric in numbers["metrics"] if metric["name"] == "accuracy")
    texts = [Page((run / "report.html").read_text()).text, (run / "report.md").read_text()]
    for text in texts:
        for side in ("base", "tuned"):
            assert f"{100 * accuracy[side]['value']:.1f}% ({100 * accuracy[side]['low']:.1f} to" in text
        assert "because 20" in text
        assert "because 80" in text
        assert "because 40" not in text  # the same verdict again is no news
        assert "because 100" in text  # but what it rests on in the end is
        assert "train.epochs: try 2." in text
        assert "12,345" in text
        assert "lora.rank" in text
        assert "the loss rose" in text
        assert "<nothing much>" in text
        assert "card arrival" in text
        assert "in between" not in text  # only the first and the last
    assert numbers["held_out_loss"] == {"first": 1.16, "best": 1.0, "best_step": 60, "last": 1.16}
    assert numbers["tokens_per_second"] == 150.5
    assert numbers["verdict"]["step"] == 100
    assert [change["step"] for change in numbers["verdict_changes"]] == [20, 80, 100]
    assert set(numbers["calibration_error"]) == {"base", "tuned"}
    assert "| preset | tiny\\|x |" in texts[1]


def test_the_same_run_gives_the_same_bytes(run):
    first = (run / "report.html").read_bytes()
    write_report(run, advice=["train.epochs: try 2."])
    assert (run / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    ("kept", "absent"),
    [
        (["metrics.jsonl"], ["base against tuned", "configuration", "data, environment and cost"]),
        (
            ["evaluation.json"],
            ["training curves, throughput and verdicts", "length against error, calibration"],
        ),
        (["config.json"], ["base against tuned"]),
    ],
)
def test_missing_parts_are_left_out_and_named(run, tmp_path, kept, absent):
    for name in kept:
        (tmp_path / name).write_bytes((run / name).read_bytes())
    write_report(tmp_path, title="partial")
    text = Page((tmp_path / "report.html").read_text()).text
    markdown = (tmp_path / "report.md").read_text()
    for part in absent:
        assert f"{part}: the run has no" in text
        assert f"{part}: the run has no" in markdown
    assert ("Base against tuned" in text) == ("evaluation.json" in kept)
    assert ("Verdicts" in text) == ("metrics.jsonl" in kept)


def test_no_run_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\nnot json\n{"step": 2, "loss": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is no JSON"):
        write_report(tmp_path)


def test_a_killed_run_and_a_diverged_one_can_be_reported(tmp_path):
    lines = [json.dumps({"step": n, "loss": float("nan") if n > 5 else 1.0}) for n in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 11, "lo')
    write_report(tmp_path)
    numbers = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert numbers["steps"] == 10
    assert numbers["train_loss"]["last_median"] is None


def test_a_step_run_twice_counts_once(tmp_path):
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 2.0},
        {"step": 1, "eval_loss": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps, losses = read_run(tmp_path).curve("loss")
    assert (steps.tolist(), losses.tolist()) == ([1, 2], [3.0, 2.0])


@pytest.mark.parametrize(
    ("expected", "given", "pieces"),
    [
        ("the red fox ran", "the grey fox ran", "the [-red -]{+grey +}fox ran"),
        ("same", "same", "same"),
        ("card_arrival", "top_up", "[-card_arrival-]{+top_up+}"),
        ("something", "", "[-something-]"),
        ('{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 7, "c": 3}', '{"a": 1, "b": [-2-]{+7+}, "c": 3}'),
    ],
)
def test_differences(expected, given, pieces):
    marks = {"same": "{}", "missing": "[-{}-]", "extra": "{{+{}+}}"}
    assert "".join(marks[kind].format(text) for kind, text in difference(expected, given)) == pieces


def test_reliability_of_a_perfectly_calibrated_and_of_an_overconfident_model():
    generator = np.random.default_rng(0)
    said = generator.random(20_000)
    _, error = reliability(said, generator.random(20_000) < said)
    assert error < 0.02
    points, error = reliability(np.full(100, 1.0), np.arange(100) < 60)
    assert error == pytest.approx(0.4)
    np.testing.assert_allclose(points, [[1.0], [0.6]])


KINDS = {
    "extraction": ('{"time": "7 pm"}', ['{"time": "8 pm"}', "no"]),
    "numeric": ("so\n#### 42", ["#### 41", "#### 42"]),
    "generation": ("The cat sat on the mat.", ["A cat sat there.", ""]),
    "instructions": ("yes", ["yes", "certainly not"]),
    "perplexity": ("any text", ["", ""]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_base", [True, False])
def test_every_kind_of_task_has_its_report(tmp_path, kind, with_base):
    reference, answers = KINDS[kind]

    class Answers(Fake):
        def generate(self, prompts, max_new_tokens):
            return [answers[n % 2] for n in range(len(prompts))]

    answer = {"role": "model", "content": reference, "constraints": {"max_words": 1}}
    rows = [Conversation([{"role": "user", "content": "q " * n + "?"}, answer], f"t:{n}") for n in range(12)]
    base = Answers(0, 1.0) if with_base else None
    evaluate_models(Answers(0, 0.5), rows, base=base, task=kind, calibrate=True).save(tmp_path)
    write_report(tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    markdown = (tmp_path / "report.md").read_text()
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    for metric in numbers["metrics"]:
        assert metric["title"] in text
        assert f"| {metric['title']} |" in markdown
    assert ("Base against tuned" in text) is with_base
    assert ("Held-out results" in text) is not with_base
    expected = {
        "extraction": "Scores per slot",
        "generation": "nrefs:1",
        "instructions": "Constraints kept",
    }
    assert expected.get(kind, "held-out loss") in text


# Words that occur in no report by themselves.
QUOTED = {
    "classification": ("quokka_{odd}", ["quokka_{odd}", "wombat_{odd}", "wombat numbat"]),
    "extraction": ('{{"time": "quokka {n}"}}', ['{{"time": "wombat {n}"}}', "wombat numbat"]),
    "numeric": ("quokka is\n#### 42", ["wombat\n#### 41", "wombat numbat"]),
    "generation": ("The quokka {n} sat on the mat.", ["A wombat {n} sat there.", "wombat"]),
    "instructions": ("quokka", ["wombat", "wombat numbat bilby"]),
}


@pytest.fixture(params=QUOTED)
def private(request, tmp_path):
    """A run whose rows, and directories, are nobody else's business; and all texts of it."""
    expected, given = QUOTED[request.param]
    rows = [
        Conversation(
            [
                {"role": "user", "content": f"potoroo {n} " * (n % 7 + 1)},
                {
                    "role": "model",
                    "content": expected.format(n=n, odd=n % 2),
                    "constraints": {"max_words": 1},
                },
            ],
            f"/home/ann/private rows/held out.jsonl:{n + 1}",
        )
        for n in range(24)
    ]

    class Answers(Fake):
        def generate(self, prompts, max_new_tokens):
            return [given[n % len(given)].format(n=n, odd=1 - n % 2) for n in range(len(prompts))]

    place = tmp_path / "kiwi" / "cards"
    place.mkdir(parents=True)
    evaluation = evaluate_models(Answers(0, 0.5), rows, base=Answers(0, 1.0), task=request.param)
    forgetting = {
        "verdict": "none",
        "reason": "no change",
        "source": "/home/ann/general.jsonl",
        "rows": 3,
        "metrics": [],
    }
    evaluation.save(place, forgetting=forgetting)
    sample = {"prompt": "dunnart", "expected": "bandicoot", "answer": "bettong"}
    records = [{"step": 0, "eval_loss": 2.0}, {"step": 5, "eval_loss": 1.0}, {"step": 5, "samples": [sample]}]
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train, held_out = "/home/ann/private rows/train.jsonl", "/home/ann/private rows/held out.jsonl"
    config = config_from({"data": {"train": f"{train},hf:org/name", "eval": held_out}})
    (place / "config.json").write_text(json.dumps(config.to_dict()))
    files = {train: "0123", held_out: "4567"}
    environment = {"jax": "1", "platform": "Linux-6.1-anns-build-x86_64"}
    (place / "manifest.json").write_text(json.dumps({"data": {"files": files}, "environment": environment}))
    texts = ["potoroo", "quokka", "wombat", "dunnart", "bandicoot", "bettong", "/home/ann", "anns-build"]
    return place, texts


def test_a_report_to_share_holds_no_text_of_a_row_and_no_directory(private, tmp_path, capsys):
    place, texts = private
    write_report(place)
    ordinary = {name: (place / f"report.{name}").read_text() for name in ("html", "md")}
    assert (
        cli.main(["report", f"--workdir={place}", "--quote_rows=False", f"--out={tmp_path / 'x.html'}"]) == 0
    )
    shared = {name: (tmp_path / f"x.{name}").read_text() for name in ("html", "md")}
    for name, report in shared.items():
        for text in texts:
            assert text in ordinary[name], text
            assert text not in report, text
        assert str(tmp_path) not in report
        assert "held out.jsonl:1" in report  # the worst rows by their place
        assert "train.jsonl,hf:org/name" in report
        assert "Quotes no rows" in report
        assert "Quotes no rows" not in ordinary[name]
        assert all(f"{metric['tuned']['value']:.3f}" in report for metric in losses(place))
    Page(shared["html"])
    # The run has what it had.
    assert {name: (place / f"report.{name}").read_text() for name in ordinary} == ordinary


def losses(place):
    return json.loads((place / "evaluation.json").read_text())["metrics"][:1]


def test_a_report_to_share_replaces_the_runs_own_where_it_is_not_put_elsewhere(run, tmp_path):
    for path in run.iterdir():
        if path.suffix in (".json", ".jsonl"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    write_report(tmp_path, quote_rows=False)
    for name in ("report.html", "report.md", "metrics.json"):
        assert "where is it" not in (tmp_path / name).read_text()
    page = Page((tmp_path / "report.html").read_text())
    assert "class 1" in page.text  # and not "a"
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"] == 60


def test_a_report_is_a_page(private, capsys):
    assert cli.main(["report", f"--workdir={private[0]}", "--out=report.pdf"]) == 2
    assert "--out=report.pdf: is no name for a page\n  end it in .html" in capsys.readouterr().err
