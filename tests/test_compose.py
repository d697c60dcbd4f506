"""Composition: tags of several files in one model; a clash is an error; averages are exact at their ends; ancestry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from icl_markup.ancestry import MOST_GENERATIONS
from icl_markup.backbone import Backbone
from icl_markup.classifier import MarkupClassifier
from icl_markup.cli import main
from icl_markup.compose import average, interpolate, merge, rename, select
from icl_markup.composition import composed
from icl_markup.errors import TagFileError
from icl_markup.model import MarkupModel
from icl_markup.tagfile import TagFile, read_tags, write_tags
from icl_markup.template import Template
from tests.conftest import tiny_backbone

LABELS = ["lost card", "weather"]
OTHER = """@tag <task> width=3 "sort messages"
@tag <say> width=1 "message"
@head
<task>
@option
 {symbol}: {name}
@demo
<say> {text} : {label}
@query
<say> {text} : {label}
"""
BOTH = """@tag <task> width=9
@tag <demo>
@head
<task>
@option
 {symbol}: {name}
@demo
<demo> {text} {label}
@query
<demo> {text} {label}
"""


@pytest.fixture(scope="module")
def bert() -> Backbone:
    return tiny_backbone("bert")


@pytest.fixture
def files(bert: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TagFile, TagFile, TagFile]:
    """Two warm-ups of the default template, and one of another, in folders a, b and c."""
    monkeypatch.chdir(tmp_path)
    models = [MarkupModel(bert, "markup_letters", seed=seed) for seed in (1, 2)]
    models.append(MarkupModel(bert, Template.parse(OTHER, "other"), seed=3))
    for name, model in zip("abc", models, strict=True):
        model.save(name, {"tasks": [f"task of {name}"], "validation accuracy": 0.5, "seed": 1})
    return read_tags("a"), read_tags("b"), read_tags("c")


Three = tuple[TagFile, TagFile, TagFile]


def same(mine: TagFile, theirs: TagFile) -> bool:
    return mine.vectors.keys() == theirs.vectors.keys() and all(
        torch.equal(mine.vectors[name], theirs.vectors[name]) for name in mine.vectors
    )


def test_one_model_uses_the_tags_of_several_files(files: Three, bert: Backbone) -> None:
    template = Template.parse(BOTH, "both")
    model = MarkupModel.from_tags(["a", "c"], bert, template=template)
    vectors = model.table.vectors()
    assert list(vectors) == ["<task>", "<demo>"]
    assert torch.equal(vectors["<demo>"], files[0].vectors["<demo>"])
    assert torch.equal(vectors["<task>"], files[2].vectors["<task>"]), "as wide as in its file, not as in the template"
    [answer] = model.classify(["will it rain"], LABELS)
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    model.save("d")
    again = read_tags("d")
    assert torch.equal(MarkupModel.from_tags("d", bert).table.rows, model.table.rows)
    assert [(p.name.split("/")[-1], dict(p.tags)) for p in again.ancestry.parents] == [
        ("a", {"<demo>": "<demo>"}),
        ("c", {"<task>": "<task>"}),
    ]
    assert [p.tensors_sha256 for p in again.ancestry.parents] == [files[0].tensors_sha256, files[2].tensors_sha256]
    assert again.training == {} and again.ancestry.operation == "merge"


def test_a_clash_of_names_is_an_error_unless_one_is_renamed_left_out_or_the_same(files: Three) -> None:
    with pytest.raises(TagFileError, match="tag <classification> is in a and, with other values, in b: rename"):
        composed(["a", "b"])
    assert same(composed(["a", "a"]), files[0]), "the same values are no clash"
    mixed = composed(["a", "b"], only={"a": ["<classification>", "<options>", "<demo>", "<input>"], "b": ["<label>"]})
    assert torch.equal(mixed.vectors["<label>"], files[1].vectors["<label>"])
    assert torch.equal(mixed.vectors["<input>"], files[0].vectors["<input>"])
    assert mixed.template.source == files[0].template.source, "what was selected from has the template for all of it"
    names = {"<classification>": "<c>", "<options>": "<o>", "<demo>": "<d>", "<input>": "<i>", "<label>": "<l>"}
    with pytest.raises(TagFileError, match="no template of these files has exactly the tags"):
        composed(["a", "b"], rename={"b": names})
    with pytest.raises(TagFileError, match="no template"):
        merge([files[0], files[2]])
    swapped = composed(["a", "b"], rename={"b": names}, template=Template.parse(BOTH.replace("<task>", "<d>"), "x"))
    assert torch.equal(swapped.vectors["<d>"], files[1].vectors["<demo>"])
    assert torch.equal(swapped.vectors["<demo>"], files[0].vectors["<demo>"])
    assert [dict(p.tags) for p in swapped.ancestry.parents] == [{"<demo>": "<demo>"}, {"<d>": "<demo>"}]


def test_a_part_of_the_tags_leaves_the_others_out_of_the_template(files: Three, bert: Backbone) -> None:
    part = select(files[0], ["<label>", "<demo>"])
    assert [tag.name for tag in part.template.tags] == ["<demo>", "<label>"] == list(part.vectors)
    assert "<input>" not in part.template.source
    write_tags(part, "part")
    assert MarkupModel.from_tags("part", bert).classify(["rain"], LABELS)
    assert same(composed("a", only=["<demo>", "<label>"]), part)
    assert same(files[0], read_tags("a")), "the parts change nothing of what they are from"


def test_renamed_tags_answer_as_before(files: Three, bert: Backbone) -> None:
    swapped = rename(files[0], {"<demo>": "<input>", "<input>": "<demo>", "<label>": "<answer>"})
    assert torch.equal(swapped.vectors["<input>"], files[0].vectors["<demo>"])
    before, after = (MarkupModel.from_tags(one, bert).classify(["rain"], LABELS) for one in (files[0], swapped))
    assert before == after
    parent = rename(swapped, {"<answer>": "<say>"}).ancestry.parents[0]
    assert parent.name.endswith("a") and parent.tags["<say>"] == "<label>" and parent.tags["<input>"] == "<demo>"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"<demos>": "<x>"}, "a: rename: no tag <demos>; did you mean '<demo>'"),
        ({"<demo>": "<input>"}, "a: rename gives two tags the name <input>"),
        ({"<demo>": "demo"}, "a: rename: "),
        ({"<demo>": "<a b>"}, "a: rename: "),
        ({"<demo>": '<x> "quoted\n@head'}, "a: rename: "),
    ],
)
def test_names_that_cannot_be_given_are_errors(names: dict[str, str], message: str, files: Three) -> None:
    with pytest.raises(TagFileError, match=message):
        rename(files[0], names)


def test_an_average_is_the_weighted_mean_and_exact_at_its_ends(files: Three) -> None:
    a, b, _ = files
    assert same(average([a, a, a]), a)
    assert same(interpolate(a, b, 0.0), a) and same(interpolate(a, b, 1.0), b)
    mean = average([a, b], [1, 3])
    for name, rows in mean.vectors.items():
        exact = (a.vectors[name].double() + 3 * b.vectors[name].double()) / 4
        assert torch.equal(rows, exact.float())
    assert same(mean, interpolate(a, b, 0.75)) and same(average([b, a], [3, 1]), mean)
    assert [p.weight for p in mean.ancestry.parents] == [0.25, 0.75]
    beyond = interpolate(a, b, 2.0).vectors["<demo>"]
    assert torch.allclose(beyond, 2 * b.vectors["<demo>"] - a.vectors["<demo>"])


def test_what_cannot_be_averaged_names_the_folders(files: Three, bert: Backbone) -> None:
    a, b, c = files
    with pytest.raises(TagFileError, match="average: c lacks tag <classification>, which a has"):
        average([a, c])
    wide = MarkupModel(bert, Template.load("markup_letters").with_width({"<demo>": 5}))
    wide.save("wide")
    with pytest.raises(TagFileError, match="tag <demo> has 2 soft tokens in a and 5 in wide"):
        interpolate(a, read_tags("wide"), 0.5)
    for weights, message in (
        ([1.0], "1 weights for 2"),
        ([0, 0], "one above it"),
        ([1, -1], "at least 0"),
        ([1e308, 1e308], "at least 0"),
        ([1, float("nan")], "at least 0"),
    ):
        with pytest.raises(TagFileError, match=message):
            average([a, b], weights)
    with pytest.raises(TagFileError, match="gets values that are not finite"):
        interpolate(a, b, 1e300)
    with pytest.raises(TagFileError, match="t is inf"):
        interpolate(a, b, float("inf"))
    with pytest.raises(TagFileError, match="between two tag files; 3 are given"):
        composed(["a", "b", "c"], operation="interpolate")
    for nothing in (merge, average, composed):
        with pytest.raises(TagFileError, match="no tag files"):
            nothing([])


def test_tags_of_other_backbones_or_answers_are_refused_by_name(files: Three) -> None:
    MarkupModel(tiny_backbone("roberta"), "markup_letters").save("other")
    for operation in ("merge", "average", "interpolate"):
        with pytest.raises(TagFileError, match="a and other are for different backbones, 'tiny-bert' and 'tiny-rob"):
            composed(["a", "other"], operation=operation)
    MarkupModel(tiny_backbone("bert"), "markup_letters", answers="names", seed=2).save("named")
    with pytest.raises(TagFileError, match="a and named are answered in different ways"):
        composed(["a", "named"], operation="average")
    assert composed(["a", "named"], operation="average", answers="names").answers == "names"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": {"d": ["<demo>"]}}, "only: 'd' is not one of the tag files a, c"),
        ({"only": {"a": ["<say>"]}}, "only: a has no tag <say>"),
        ({"only": {"a": []}}, "select names no tag"),
        ({"only": "<demo>"}, "only is one string"),
        ({"only": {"a": "<demo>"}}, "only: a: give a list of tag names, not '<demo>'"),
        ({"rename": {"a": {"<demo>": "<d>"}, "c": "<x>"}}, "rename: c: give a dict of tag names, not '<x>'"),
        ({"only": ["<nowhere>"]}, "none of the tag files has <nowhere>"),
        ({"rename": {"<nowhere>": "<x>"}}, "none of the tag files has <nowhere>"),
        ({"rename": {"a": {"<say>": "<x>"}}}, "rename: a has no tag <say>"),
        ({"template": "plain_letters_text_label"}, "has no tags"),
        ({"template": "markup_letters"}, "c: has none of the tags .* of the template"),
        ({"template": Template.parse(BOTH.replace("<demo>", "<new>"), "n")}, "a: has none of the tags <new>, <task>"),
        ({"revision": "main"}, "revision 'main' is given for 2 tag files"),
    ],
)
def test_options_that_name_what_is_not_there_are_errors(options: dict[str, object], message: str, files: Three) -> None:
    with pytest.raises(TagFileError, match=message):
        composed(["a", "c"], **options)


def test_a_tag_that_no_file_has_is_to_be_warmed_up(files: Three) -> None:
    with pytest.raises(TagFileError, match=r"has tag <new>, which a lack; warm it up on top of them \(start_from\)"):
        composed("a", template=Template.parse(BOTH.replace("<task>", "<new>"), "n"))


def test_saving_what_was_loaded_keeps_what_is_known_and_tells_of_changes(files: Three, bert: Backbone) -> None:
    model = MarkupModel.from_tags("a", bert)
    model.save("copy")
    assert (Path("copy") / "tags.json").read_bytes() == (Path("a") / "tags.json").read_bytes()
    with torch.no_grad():
        model.table.rows[0] += 1
    changed = read_tags(model.save("changed"))
    assert changed.training == {} and changed.ancestry.operation == "change"
    assert changed.ancestry.parents[0].tensors_sha256 == files[0].tensors_sha256
    assert changed.ancestry.parents[0].training == files[0].training


def test_ancestors_are_told_for_some_generations(files: Three) -> None:
    made = files[0]
    for generation in range(MOST_GENERATIONS + 3):
        made = read_tags(write_tags(average([made, files[1]]), f"g{generation}"))
    depth, ancestry = 0, made.ancestry
    while ancestry is not None:
        depth, ancestry = depth + 1, ancestry.parents[0].ancestry
    assert depth == MOST_GENERATIONS
    path = Path("g0") / "tags.json"
    details = json.loads(path.read_text())
    del details["sha256"]  # as somebody would who edits it on purpose
    details["ancestry"]["parents"][0]["ancestry"] = json.loads((Path("g10") / "tags.json").read_text())["ancestry"]
    path.write_text(json.dumps(details))
    with pytest.raises(TagFileError, match="damaged: ValueError an ancestry of more than"):
        read_tags("g0")
    for value in ({"operation": "merge"}, {"operation": "merge", "parents": [3]}, "merge"):
        path.write_text(json.dumps(details | {"ancestry": value}))
        with pytest.raises(TagFileError, match=r"tags.json: damaged"):
            read_tags("g0")


def test_a_classifier_takes_several_files_and_its_folder_remembers_them(files: Three, bert: Backbone) -> None:
    bert.model.save_pretrained("model")
    bert.tokenizer.save_pretrained("model")
    Path("both.tmpl").write_text(BOTH)
    classifier = MarkupClassifier(["a", "c"], backbone="model", template="both.tmpl", device="cpu")
    classifier.fit(["I lost my card", "will it rain"], LABELS)
    classifier.save("classifier")
    assert [p.name for p in read_tags(Path("classifier") / "tags").ancestry.parents] == ["a", "c"]
    loaded = MarkupClassifier.load("classifier", device="cpu")
    assert (loaded.predict_proba(["is it cold"]) == classifier.predict_proba(["is it cold"])).all()


def test_the_command_writes_a_folder_and_says_what_is_from_where(
    files: Three, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("both.tmpl").write_text(BOTH)
    merged = ["compose", "a", "c", "--only", "a", "<demo>", "--template", "both.tmpl", "--license", "cc0-1.0"]
    assert main([*merged, "--out", "d"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a: <demo>", "c: <task>", "tags: d"]
    assert read_tags("d").license == "cc0-1.0"
    assert main(["compose", "a", "b", "--average", "--weights", "1", "3", "--out", "mean"]) == 0
    assert "b: <classification>, <options>, <demo>, <input>, <label>, weight 0.75" in capsys.readouterr().out
    assert main(["compose", "a", "b", "--interpolate", "0.75", "--out", "between"]) == 0
    assert same(read_tags("mean"), read_tags("between"))
    assert main(["compose", "a", "--rename", "a", "<demo>", "<example>", "--out", "renamed"]) == 0
    assert "<example>" in read_tags("renamed").template.source
    capsys.readouterr()
    for arguments, message in (
        (["a", "b"], "tag <classification> is in a and"),
        (["a", "b", "--weights", "1"], "--weights are those of --average"),
        (["a", "--only", "a"], "--only a: name the tags"),
        (["a", "nowhere"], "nowhere: there is no such folder"),
    ):
        assert main(["compose", *arguments, "--out", "e"]) == 2
        assert message in capsys.readouterr().err
        assert not Path("e").exists()
