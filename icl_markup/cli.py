"""The command line: ``icl-markup COMMAND``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from icl_markup.config import describe, load_config
from icl_markup.errors import Interrupted, MarkupError, PromptError
from icl_markup.export_cli import add_commands as add_export_commands
from icl_markup.models import DEFAULT
from icl_markup.models_cli import add_command as add_models
from icl_markup.plan_cli import add_command as add_plan
from icl_markup.priors import PriorChoice
from icl_markup.processes import is_first, leave, let_the_first_speak
from icl_markup.quantisation import add_argument as add_quantisation
from icl_markup.serve import add_arguments as add_serve_arguments
from icl_markup.tag_commands import add_tag_commands
from icl_markup.understand import add_commands as add_understanding

_BACKBONE = f"""a model that `icl-markup models` lists, a transformers folder, a GGUF file or a hub name (default: the
tags', or {DEFAULT})"""
_FIT = "Make a classifier of labels and examples; nothing is trained. Writes a folder for predict and serve."
_PREDICT = """Classify texts; writes JSONL. Exit codes: 0 done; 1 done, but some texts have an error instead of an
answer (--keep-errors); 2 an error; 130 interrupted."""
_SERVE = """Serve a classifier over HTTP until SIGTERM or Ctrl-C, with a page at / and the API described at /docs. The
API key, if there is one, comes from an environment variable. Exit codes: 0 ended by a signal, all answered; 1 ended,
but some requests took longer than --grace-seconds and were refused; 2 an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done; 1: done, but texts were left out with their errors; 2: an error, which is printed in one line; 70: a
    defect of this program, with where it was; 130: interrupted. Of several processes the first speaks.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    args, overrides = _split(arguments)
    command: Callable[[argparse.Namespace, list[str]], int | None] = args.run
    try:
        code = command(args, overrides) or 0
        leave()
        return code
    except (Interrupted, KeyboardInterrupt) as error:
        if is_first():
            print(f"icl-markup: {str(error) or 'interrupted'}{_how_to_go_on(arguments)}", file=sys.stderr)
        return 130
    except MarkupError as error:
        let_the_first_speak()
        print(f"icl-markup: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has gone (`| head`): what is left must not be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that is gone
        print(f"icl-markup: {error}", file=sys.stderr)
        return 2
    except Exception:  # nobody should take Python's own code for it, 1, for that of a run with some errors
        traceback.print_exc()
        print("icl-markup: this is a defect of icl-markup; please report it with the lines above", file=sys.stderr)
        return 70


def _how_to_go_on(arguments: list[str]) -> str:
    """Return what to say after an interruption: the command that goes on, where one does."""
    command = shlex.join(["icl-markup", *arguments])
    if arguments[0] == "warmup":
        resumes = any(word.startswith("--resume") for word in arguments)
        return f"\ngo on with: {command}{'' if resumes else ' --resume true'}"
    if arguments[0] == "evaluate":
        return f"\nwhat was measured is kept; go on with: {command}"
    if arguments[0] == "predict" and any(word.split("=")[0] == "--out" for word in arguments):
        return f"\nthe answers so far are kept; go on with: {command}"
    return ""


def _split(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse what the command declares; what a configuration command does not declare are overrides."""
    parser = _parser()
    if arguments and arguments[0] in ("warmup", "evaluate"):
        # What follows the file are overrides, --help aside.
        first = arguments[1:2]
        if first and first[0].startswith("-") and first[0] not in ("-h", "--help"):
            parser.error(f"{arguments[0]}: give the configuration file first, then its overrides")
        declared = ("-h", "--help", "--fast") if arguments[0] == "evaluate" else ("-h", "--help")
        helped = [word for word in arguments[2:] if word in declared]
        rest = [word for word in arguments[2:] if word not in declared]
        return parser.parse_args([*arguments[:2], *helped]), rest
    if arguments and arguments[0] == "plan":
        return parser.parse_known_args(arguments)
    return parser.parse_args(arguments), []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="icl-markup", description="Soft-token tags for in-context classification.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    warmup = commands.add_parser("warmup", help="warm tags up on many tasks", add_help=False)
    warmup.add_argument("config", nargs="?", help="a YAML file, such as configs/warmup.yaml")
    warmup.add_argument("-h", "--help", action="store_true")
    warmup.set_defaults(run=_warmup)

    add_plan(commands)

    evaluate = commands.add_parser("evaluate", help="measure methods on the same episodes", add_help=False)
    evaluate.add_argument("config", nargs="?", help="a YAML file, such as configs/experiments/news.yaml")
    evaluate.add_argument("-h", "--help", action="store_true")
    evaluate.add_argument("--fast", action="store_true")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="turn rows of results into a page of tables and figures")
    report.add_argument("rows", nargs="+", help="JSONL files of rows")
    report.add_argument("--out", default="results/README.md", help="the Markdown page; its figures go beside it")
    report.set_defaults(run=_report)

    fit = commands.add_parser("fit", help="make a classifier of examples", description=_FIT)
    _add_fit(fit)
    fit.set_defaults(run=_fit)

    predict = commands.add_parser("predict", help="classify texts", description=_PREDICT)
    predict.add_argument("--classifier", help="a classifier's folder, made by fit; brings everything along")
    _add_model(predict)
    _add_episode(predict)
    predict.add_argument("--file", help="a text a line, or .jsonl, .csv, .tsv, .parquet; - or nothing: standard input")
    predict.add_argument("--text-column", default="text", help="where a file of rows has its texts")
    predict.add_argument("--out", help="a JSONL file; if it exists, answers go on after its last one")
    predict.add_argument("--calibration", choices=get_args(PriorChoice), default="auto",
                         help="divide out what labels get without evidence: from texts without content in the same "
                         "prompt (contextual) or in one without options and demonstrations (unconditional), or from "
                         "random words (domain)")  # fmt: skip
    predict.add_argument("--top", type=int, help="give the probabilities of so many labels")
    predict.add_argument("--keep-errors", action="store_true", help="write a text's error and go on; exit code 1")
    predict.add_argument("--batch-tokens", type=int, help="most tokens of one forward pass")
    predict.add_argument("texts", nargs="*", help="the texts; write -- before the first")
    predict.set_defaults(run=_predict)

    serve = commands.add_parser("serve", help="serve a classifier over HTTP, with a page", description=_SERVE)
    add_serve_arguments(serve)
    serve.set_defaults(run=_serve)

    show = commands.add_parser("show", help="show a prompt as pieces and ids")
    _add_model(show)
    _add_episode(show)
    show.add_argument("texts", nargs=1, metavar="text", help="the text to classify")
    show.set_defaults(run=_show)

    add_understanding(commands, _add_model, _add_episode)

    add_tag_commands(commands)

    add_export_commands(commands)

    add_models(commands)

    quickstart = commands.add_parser("quickstart", help="warm up and measure on sample tasks")
    _add_quickstart(quickstart)
    quickstart.set_defaults(run=_quickstart)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    _add_tags(parser, "a tag folder or hub name (user/tags); brings its backbone and template along")
    parser.add_argument("--backbone", help=_BACKBONE)
    parser.add_argument("--template", help="a template's name or path (default: the tags', or the default markup)")
    parser.add_argument("--answers", choices=["auto", "symbols", "names"], default="auto",
                        help="read option symbols, or score whole names (auto: what the template shows, or what suits "
                        "the backbone; beyond 26 labels always names)")  # fmt: skip
    _add_chat(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps …")
    add_quantisation(parser)


def _add_tags(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--tags", help=text)
    parser.add_argument("--revision", help="a commit, tag or branch of --tags on the hub; or write user/tags@revision")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chat", action="store_true", help="put prompts into the model's chat template (tags bring "
                        "along whether they stand in one)")  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="with --chat: a system message before the prompt")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("examples", help="a .jsonl, .csv, .tsv or .parquet file, or a task folder: texts and labels")
    parser.add_argument("--out", required=True, help="the folder to write; an existing classifier is replaced")
    _add_tags(parser, "a folder of warmed-up tags, or their hub name (default: untrained ones)")
    parser.add_argument("--backbone", help=_BACKBONE)
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps …")
    _add_chat(parser)
    add_quantisation(parser)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--shots", type=int, help="keep the first so many examples of each label (default: all)")
    parser.add_argument("--validation", help="a file as the examples: learns temperature and threshold; its label "
                        "'none of the above' marks texts that no label fits")  # fmt: skip
    parser.add_argument("--none-of-the-above", choices=["option", "threshold"])
    parser.add_argument("--calibration", choices=[*get_args(PriorChoice), "batch"], default="auto")
    parser.add_argument("--retriever", choices=["backbone", "bm25", "embedding"], default="backbone")
    parser.add_argument("--permutations", type=int, default=1, help="orders of the options to average over")
    parser.add_argument("--cache-mib", type=int, default=1024, help="MiB of what prompts of a causal backbone begin "
                        "with, kept for later calls (default: 1024)")  # fmt: skip
    parser.add_argument("--batch-tokens", type=int, help="most tokens of one forward pass")


def _add_episode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="label names")
    parser.add_argument("--task", help="a task file or folder: its label names and its demonstrations are used")
    parser.add_argument("--shots", type=int, default=1, help="demonstrations a label taken from --task")
    parser.add_argument("--demo", nargs=2, action="append", default=[], metavar=("TEXT", "LABEL"),
                        help="a demonstration; may be given several times")  # fmt: skip
    parser.add_argument("--none-of-the-above", action="store_true", help="offer that as the last option")


def _add_quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/quickstart", help="the folder for the run")
    parser.add_argument("--episodes", type=int, default=4, help="episodes of five texts per unseen task")
    parser.add_argument("--steps", type=int, help="warm-up steps, instead of the default's")
    parser.add_argument("--rows", help="a JSONL file to append the rows of the table to")


def _warmup(args: argparse.Namespace, overrides: list[str]) -> None:
    from icl_markup.warmup import run_warmup
    from icl_markup.warmup_config import WarmupConfig

    if _helped(args, WarmupConfig, "warmup"):
        return
    result = run_warmup(load_config(WarmupConfig, args.config, overrides))
    if not is_first():
        return
    print(f"tags: {result.folder}")
    for key, value in result.summary.items():
        print(f"{key}: {value}")


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    from icl_markup.experiment import load_experiment, run_experiment
    from icl_markup.experiment_config import ExperimentConfig
    from icl_markup.report import print_rows

    if _helped(args, ExperimentConfig, "evaluate"):
        return
    config = load_experiment(args.config, overrides, fast=args.fast)
    command = shlex.join(["icl-markup", "evaluate", args.config, *(["--fast"] if args.fast else []), *overrides])
    rows = run_experiment(config, command)
    if not is_first():
        return
    print_rows(rows, config.experiment)
    print(f"rows: {config.output}")


def _report(args: argparse.Namespace, _overrides: list[str]) -> None:
    from icl_markup.report import write_report

    command = shlex.join(["icl-markup", "report", *args.rows, *(["--out", args.out])])
    print(f"page: {write_report([Path(path) for path in args.rows], Path(args.out), command=command)}")


def _helped(args: argparse.Namespace, cls: type, name: str) -> bool:
    if args.config is None or args.help:
        print(f"usage: icl-markup {name} CONFIG.yaml [--key value ...]\n\nkeys:\n{describe(cls)}")
        return True
    return False


def _fit(args: argparse.Namespace, _overrides: list[str]) -> None:
    from icl_markup.fit import fit_files

    for line in fit_files(args):
        print(line)


def _predict(args: argparse.Namespace, _overrides: list[str]) -> int:
    from icl_markup.output import resumed
    from icl_markup.predict import open_texts, predict_lines
    from icl_markup.serving import ask_for

    failed = 0
    with open_texts(args.texts, args.file, args.text_column) as given, ExitStack() as stack:
        ask = ask_for(args)
        if not args.out:
            for line in predict_lines(ask, given, keep_errors=args.keep_errors):
                print(line.json, flush=True)
                failed += line.failed
            return 1 if failed else 0
        if args.file and Path(args.out).exists() and Path(args.out).samefile(args.file):
            raise PromptError(f"--out {args.out}: is the file of the texts; choose another")
        found = stack.enter_context(resumed(args.out, given))
        lines = found.write(predict_lines(ask, found.texts, keep_errors=args.keep_errors))
        failed = found.failed + sum(line.failed for line in tqdm(lines, desc="classifying", unit="text", disable=None))
    return 1 if failed else 0


def _serve(args: argparse.Namespace, _overrides: list[str]) -> int:
    from icl_markup.serve import serve

    return serve(args)


def _show(args: argparse.Namespace, _overrides: list[str]) -> None:
    from icl_markup.inspection import print_prompt
    from icl_markup.serving import load_for, task_episode

    print_prompt(load_for(args), task_episode(args), args.texts[0])


def _quickstart(args: argparse.Namespace, _overrides: list[str]) -> None:
    from icl_markup.quickstart import run_quickstart

    overrides = () if args.steps is None else ("--optimiser.steps", str(args.steps))
    run_quickstart(
        Path(args.output), episodes=args.episodes, overrides=overrides, rows=Path(args.rows) if args.rows else None
    )


if __name__ == "__main__":
    sys.exit(main())
