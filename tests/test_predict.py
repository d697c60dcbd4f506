"""`fit` and `predict` over files: streaming, resumable, and with exit codes that say what came of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from icl_markup import MarkupClassifier, MarkupError
from icl_markup.cli import main
from icl_markup.output import resumed
from icl_markup.predict import Answer, Text, predict_lines
from icl_markup.tasks import NONE_OF_THE_ABOVE
from tests.conftest import TEXTS, tiny_backbone


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, examples in each kind of file, and a classifier made of them."""
    folder = tmp_path_factory.mktemp("place")
    backbone = tiny_backbone("bert")
    for part in (backbone.model, backbone.tokenizer):
        part.save_pretrained(folder / "backbone")
    rows = [(text, label) for label, texts in TEXTS.items() for text in texts[:3]]
    (folder / "examples.csv").write_text("utterance,intent\n" + "".join(f'"{t}",{i}\n' for t, i in rows))
    held = [(texts[3], label) for label, texts in TEXTS.items()] + [("seven times eight", NONE_OF_THE_ABOVE)]
    (folder / "held.csv").write_text("utterance,intent\n" + "".join(f'"{t}",{i}\n' for t, i in held))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t, _ in rows))
    (folder / "texts.txt").write_text("\n\n".join(t for t, _ in rows) + "\n")
    columns = ["--text-column", "utterance", "--label-column", "intent"]
    arguments = ["fit", str(folder / "examples.csv"), *columns, "--backbone", str(folder / "backbone"), "--shots", "2"]
    more = ["--validation", str(folder / "held.csv"), "--none-of-the-above", "threshold", "--permutations", "2"]
    assert main([*arguments, *more, "--out", str(folder / "classifier")]) == 0
    return folder


def test_fit_keeps_what_it_was_told(place: Path) -> None:
    classifier = MarkupClassifier.load(place / "classifier")
    assert classifier.labels() == sorted(TEXTS)
    assert sorted(classifier.texts_) == sorted(text for texts in TEXTS.values() for text in texts[:2])
    assert classifier.n_permutations == 2
    assert classifier.calibration_.threshold is not None


@pytest.mark.parametrize("file", ["texts.jsonl", "texts.txt"])
def test_predict_answers_as_the_classifier(place: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--classifier", str(place / "classifier"), "--file", str(place / file)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [text for texts in TEXTS.values() for text in texts[:3]]
    assert [line["text"] for line in lines] == texts
    classifier = MarkupClassifier.load(place / "classifier")
    assert [line["label"] for line in lines] == classifier.predict(texts).tolist()
    assert list(lines[0]["probabilities"]) == sorted([*TEXTS, NONE_OF_THE_ABOVE])


def test_an_interrupted_output_goes_on_to_the_same_answers(place: Path, tmp_path: Path) -> None:
    command = ["predict", "--classifier", str(place / "classifier"), "--file", str(place / "texts.txt"), "--top", "2"]
    assert main([*command, "--out", str(tmp_path / "whole.jsonl")]) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(json.loads(whole.splitlines()[0])["probabilities"]) == 2
    cut = tmp_path / "cut.jsonl"
    for length in [0, 1, len(whole) // 2, len(whole) - 1, len(whole)]:
        cut.write_bytes(whole[:length])
        assert main([*command, "--out", str(cut)]) == 0
        assert cut.read_bytes() == whole, length
    cut.write_bytes(b'{"text": "another text", "label": "x"}\n')
    assert main([*command, "--out", str(cut)]) == 2
    assert cut.read_bytes() == b'{"text": "another text", "label": "x"}\n', "nothing of it is lost"


def test_every_length_of_a_cut_file_is_completed(tmp_path: Path) -> None:
    texts = ["eins", "zwei ü", "drei"]
    whole = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode()
    for length in range(len(whole) + 1):
        path = tmp_path / "out.jsonl"
        path.write_bytes(whole[:length])
        source = (Text(f"line {i}", text) for i, text in enumerate(texts))
        with resumed(path, source) as found:
            list(found.write(predict_lines(lambda some: [{} for _ in some], found.texts)))
        assert path.read_bytes() == whole, length


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n', "holds 3 answers, but there are 2 texts"),
        ('{"text": "b"}\n', "answers 'b', but the text at line 0 is 'a'"),
        ("[1]\n", "not an answer"),
        ("not json\n", "not an answer"),
        ("my precious notes", "no answer of this command"),
        ('{"text": "a"}\n{"text": "c", "lab', "no answer of this command"),
        ('{"text": "a"}\n{"text": "b"}\n{"te', "no answer of this command"),
    ],
)
def test_an_output_of_something_else_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    source = (Text(f"line {i}", text) for i, text in enumerate("ab"))
    with pytest.raises(MarkupError, match=message), resumed(path, source):
        pass
    assert path.read_text() == content


def test_a_text_that_fails_ends_the_stream_or_has_a_line_of_its_own(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ['{"text": "will it rain"}', '{"text": "  "}', '{"text": "my card"}']
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    command = ["predict", "--classifier", str(place / "classifier"), "--file", str(tmp_path / "t.jsonl")]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1
    assert "t.jsonl:2: X: text 0 is empty" in printed.err
    assert main([*command, "--keep-errors"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in line for line in lines] == [False, True, False]
    kept = ["--keep-errors", "--out", str(tmp_path / "out.jsonl")]
    assert main([*command, *kept]) == 1
    assert main([*command, *kept]) == 1, "the file holds an error, whoever wrote it"
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_rows_without_a_text_and_broken_rows_cost_no_other_row(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ['{"text": "will it rain"}', '{"text": null}', '{"text": "x\\ud800"}', '{"text": "my card"}', "{broken"]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    out = tmp_path / "out.jsonl"
    command = ["predict", "--classifier", str(place / "classifier"), "--file", str(tmp_path / "t.jsonl")]
    assert main([*command, "--keep-errors", "--out", str(out)]) == 2
    assert "t.jsonl:5: not valid JSON" in capsys.readouterr().err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in line for line in lines] == [False, True, True, False]
    (tmp_path / "t.jsonl").write_text("\n".join([*rows[:4], '{"text": "sunny or not"}']))
    assert main([*command, "--keep-errors", "--out", str(out)]) == 1
    assert len(out.read_text().splitlines()) == 5
    before = (tmp_path / "t.jsonl").read_bytes()
    assert main([*command, "--out", str(tmp_path / "t.jsonl")]) == 2
    assert (tmp_path / "t.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "a", "b"], "leave --labels away"),
        (["--tags", "x"], "leave --tags away"),
        (["--top", "0"], "--top 0"),
        (["--file", "none.jsonl"], "cannot be read"),
        (["--file", "bad.jsonl"], "bad.jsonl:1: column 'text' is missing"),
        (["--file", "number.jsonl"], "is no text"),
        (["--classifier", "nowhere"], "is this a classifier folder"),
        (["--out", "missing/folder/out.jsonl"], "cannot be written"),
    ],
)
def test_mistakes_have_one_message(
    arguments: list[str], message: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"texts": "a"}\n')
    Path("number.jsonl").write_text('{"text": 3}\n')
    texts = [] if "--file" in arguments else ["--", "a text"]
    assert main(["predict", "--classifier", str(place / "classifier"), *arguments, *texts]) == 2
    assert message in capsys.readouterr().err


def test_memory_does_not_grow_with_the_stream() -> None:
    asked: list[int] = []

    def ask(texts: list[str]) -> list[Answer]:
        asked.append(len(texts))
        return [{"label": text} for text in texts]

    def endless() -> Iterator[Text]:
        for i in itertools.count():
            yield Text(str(i), str(i))

    first = list(itertools.islice(predict_lines(ask, endless()), 1000))
    assert [json.loads(line.json)["label"] for line in first] == [str(i) for i in range(1000)]
    assert max(asked) <= 256
    assert sum(asked) < 1300


def test_labels_come_back_as_they_were_written(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.csv").write_text("text,label\nmy card,lost_card\nwill it rain,weather\n")
    command = ["--backbone", str(place / "backbone"), "--out", str(tmp_path / "c")]
    assert main(["fit", str(tmp_path / "e.csv"), *command]) == 0
    classifier = MarkupClassifier.load(tmp_path / "c")
    assert classifier.labels() == ["lost_card", "weather"]
    assert classifier.compose("a text")[1] == ["lost card", "weather"], "words in the prompt"
    for row, message in (("a text,", "e.csv:2: the label is empty"), ("", "no examples")):
        (tmp_path / "e.csv").write_text(f"text,label\n{row}\n" if row else "text,label\n")
        assert main(["fit", str(tmp_path / "e.csv"), *command]) == 2
        assert message in capsys.readouterr().err
    for label in ("NaN", "[1]", "true", "null"):
        (tmp_path / "e.jsonl").write_text(f'{{"text": "a", "label": {label}}}\n')
        assert main(["fit", str(tmp_path / "e.jsonl"), *command]) == 2
        assert "e.jsonl:1" in capsys.readouterr().err


def test_fit_reads_a_task_folder_with_its_validation_split(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "task"
    task.mkdir()
    for split, index in (("train", 0), ("validation", 1)):
        rows = [{"text": texts[index], "label": label} for label, texts in TEXTS.items()]
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["fit", str(task), "--backbone", str(place / "backbone"), "--out", str(tmp_path / "c")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "labels: 4, examples: 4" in printed
    assert "calibrated on 4 texts" in printed
    assert "recall of the retriever on them: 1.000" in printed
    assert MarkupClassifier.load(tmp_path / "c").calibration_.temperature != 1.0
    assert main(["fit", str(task), "--shots", "0", "--out", str(tmp_path / "d")]) == 2
    (tmp_path / "empty.csv").write_text("text,label\n")
    assert main(["fit", str(tmp_path / "empty.csv"), "--out", str(tmp_path / "d")]) == 2
    assert "no examples" in capsys.readouterr().err


def test_a_line_of_another_encoding_costs_no_other_line(place: Path, tmp_path: Path) -> None:
    texts = tmp_path / "mixed.txt"
    texts.write_bytes(b"where is my card\n" + "caf\u00e9\n".encode("latin-1") + b"when do you open\n")
    command = ["predict", "--classifier", str(place / "classifier"), "--file", str(texts)]
    assert main([*command, "--out", str(tmp_path / "stopped.jsonl")]) == 2
    assert main([*command, "--keep-errors", "--out", str(tmp_path / "out.jsonl")]) == 1
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["label" in line for line in lines] == [True, False, True]
    assert "mixed.txt:2: not UTF-8" in lines[1]["error"]
    assert main([*command, "--keep-errors", "--out", str(tmp_path / "out.jsonl")]) == 1, "it goes on where it ended"


def test_a_defect_has_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("icl_markup.serving.load_for", broken)
    assert main(["show", "--labels", "a", "b", "--", "text"]) == 70
    assert "ZeroDivisionError: a defect" in capsys.readouterr().err
