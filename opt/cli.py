"""The command line: `opt VERB [OPTIONS]`, or `python -m opt VERB [OPTIONS]`.

A verb is a function of one dataclass. The table below names it as text and it is imported when its verb is called, so
that `opt --help` answers at once. The dataclass becomes the options, the function's docstring the help text.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import io
import os
import select
import signal
import sys
import threading
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import opt
from opt.config import RunAgain, UserError


class Verb(NamedTuple):
    """Where a verb's function lives ("module:function") and what it does, in one line."""

    target: str
    summary: str


VERBS = {
    "doctor": Verb("opt.doctor:doctor", "what works on this machine, and how to mend what does not"),
    "scenes": Verb("feature_extract.sources.spoken_scenes:scenes", "draw and speak the built-in data set"),
    "download open-images": Verb(
        "feature_extract.download.open_images:download", "fetch narrated pictures of Open Images, with the recordings"
    ),
    "extract": Verb("feature_extract.job:extract", "turn pictures, captions and recordings into shards of features"),
    "shards verify": Verb("opt.data.verify:verify", "check every byte of a folder of shards"),
    "shards inspect": Verb("opt.data.verify:inspect", "show what a folder of shards holds"),
    "shards merge": Verb("opt.data.merge:merge", "several folders of shards to one"),
    "shards dedup": Verb("opt.data.dedup:dedup", "leave out copies of test pictures, exact and near"),
    "shards split": Verb("opt.data.split:split", "hold out a test part that stays the same, by a hash of keys"),
    "shards units": Verb("opt.data.units:units", "speech codes for every recording, by k-means of its features"),
    "shards caption": Verb("feature_extract.capfilt:caption_shards", "a written caption for every picture, by a model"),
    "shards filter": Verb("feature_extract.capfilt:filter_shards", "leave out captions that do not fit their picture"),
    "shards export": Verb("opt.data.export:export", "shards to another format: webdataset"),
    "convert dalle": Verb("opt.weights.dalle:convert", "DALL-E's published image tokenizer to a file for extraction"),
    "import": Verb("opt.weights.importing:import_checkpoint", "a published checkpoint to a model for every verb"),
    "pretrain": Verb("pretrain.run:pretrain", "train a system on shards, or go on with a run"),
    "stages": Verb("pretrain.stages:stages", "train a system in stages, each from the model of the one before"),
    "finetune": Verb("pretrain.finetune:finetune", "tune a model for retrieval, captions, questions or statements"),
    "generate": Verb("eval.generate:generate", "describe, transcribe or draw from your own files"),
    "index": Verb("eval.lookup.index:index", "pictures, captions and recordings as vectors, to search in"),
    "search": Verb("eval.lookup.search:search", "what is nearest to your words, picture or recording in an index"),
    "eval retrieval": Verb("eval.retrieval:retrieval", "search between pictures, text and speech: recall at 1, 5, 10"),
    "eval transcribe": Verb("eval.speech:transcribe", "write down what is said: word error rate"),
    "eval caption": Verb("eval.captioning:caption", "describe pictures in words"),
    "eval vqa": Verb("eval.vqa:vqa", "answer questions about pictures: VQA accuracy"),
    "eval nlvr2": Verb("eval.nlvr2:nlvr2", "judge sentences about two pictures: accuracy and consistency"),
    "eval proofread": Verb("eval.proofreading:proofread", "find and mend a wrong word of each caption: accuracy"),
    "eval text-to-image": Verb("eval.image_generation:text_to_image", "draw pictures from captions"),
    "eval classify": Verb(
        "eval.classification:classify", "linear probe for each subset of modalities: average precision"
    ),
    "eval zero-shot": Verb("eval.zero_shot:zero_shot", "sort pictures or recordings into classes by their names alone"),
    "report": Verb("eval.report:report", "one page from a run, or several side by side: tables, plots, pictures"),
    "demo": Verb("opt.demo:demo", "all of the above on spoken scenes, from nothing to the report"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return the exit status: 0 done, 2 a mistake of the user's, 75 run me again, 130 interrupted.

    What the file system refuses (a full disk, a folder that cannot be written) is answered as a mistake is.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show ends no verb
            stream.reconfigure(errors="backslashreplace")
    if argv == ["--version"]:
        print(f"opt {opt.__version__}")
        return 0
    name = " ".join(argv[:2]) if " ".join(argv[:2]) in VERBS else " ".join(argv[:1])
    if name not in VERBS:
        return _overview(argv)
    prog = f"opt {name}"
    before = _end_well(prog)
    try:
        if "" in argv or any(word.startswith("--") and word.endswith("=") for word in argv):
            raise UserError("one of the words given is empty; a shell variable that is not set, most likely")
        function = _function(VERBS[name])
        try:
            config = _parse(function, prog, argv[len(name.split()) :])
        except SystemExit as ended:  # the parser has shown the help text or said what is wrong with the options
            if ended.code == os.EX_TEMPFAIL:
                raise
            return 2 if ended.code else 0
        function(config)
        if sys.stdout is not None:  # nobody gave us one
            sys.stdout.flush()
    except UserError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except SystemExit as ended:  # asked to stop before there was work to save, or another process of the job said why
        return int(ended.code or 0)
    except RunAgain as stopped:
        _say(f"{prog}: {stopped}; run the same command again to go on")
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        _say(f"{prog}: interrupted; run the same command again to go on")
        return 130
    except BrokenPipeError:
        if not _reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # lets the interpreter's last flush succeed
        return 1
    except OSError as error:
        if error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        hint = "; make room and run the same command again" if error.errno == errno.ENOSPC else ""
        print(f"{prog}: error: {place}{error.strerror}{hint}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _end_well(prog: str) -> dict[int, Any]:
    """Let a scheduler's signal end a verb with status 75 from its first moment on; verbs with work to save have
    handlers of their own while they do it. Returns the handlers there were."""

    def stop(number: int, frame: Any) -> None:
        _say(f"{prog}: stopped as asked; run the same command again to go on")
        raise SystemExit(os.EX_TEMPFAIL)

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}


def _say(text: str) -> None:
    """What every process of a job would say alike is said by the first."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def _overview(argv: list[str]) -> int:
    """Answer `opt`, `opt --help`, `opt GROUP [--help]` with the table of verbs, and anything else with an error."""
    words = [word for word in argv if word not in ("-h", "--help")]
    group = f"{words[0]} " if words else ""
    verbs = {name: verb for name, verb in VERBS.items() if name.startswith(group)}
    if len(words) <= 1 and verbs:
        print(f"usage: opt {group}VERB [OPTIONS]\n")
        width = max(map(len, verbs))
        for name, verb in verbs.items():
            print(f"  {name:{width}}  {verb.summary}")
        print("\n`opt VERB --help` shows a verb's options and an example. `python -m opt` is the same program.")
        return 0
    asked = " ".join(words[: 2 if verbs else 1])
    choices = [*VERBS, *{name.split()[0]: None for name in VERBS if " " in name}]
    nearest = difflib.get_close_matches(asked, choices, n=1, cutoff=0.5)
    hint = f"did you mean `opt {nearest[0]}`?" if nearest else "`opt --help` lists the verbs"
    print(f"opt: error: there is no verb {asked!r}; {hint}", file=sys.stderr)
    return 2


def _function(verb: Verb) -> Callable[[Any], None]:
    """Import the verb's function. Raises UserError when a package it needs is not installed."""
    module, name = verb.target.split(":")
    try:
        function: Callable[[Any], None] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name.split(".")[0]):
            raise
        raise UserError(f"needs the package {error.name!r}, which is not installed; `opt doctor` says how") from error
    return function


def _parse(function: Callable[[Any], None], prog: str, argv: list[str]) -> Any:
    """The function's dataclass, filled from the options.

    A class whose options depend on an earlier word of the line (`opt pretrain opt.tiny ...`) has a classmethod
    `prepare(argv) -> (type, instance | None)` that gives the concrete type and the values to begin with.
    """
    import tyro

    kind = typing.get_type_hints(function)["config"]
    default: Any = None
    if hasattr(kind, "prepare"):
        kind, default = kind.prepare(argv)
    if {"-h", "--help"} & set(argv):
        argv = ["--help"]  # the parser leaves out of the help text what it has already read
    given = {} if default is None else {"default": default}
    return tyro.cli(kind, prog=prog, description=inspect.getdoc(function) or "", args=argv, **given)


def _reader_left() -> bool:
    """Whether it is our standard output that nobody reads any more (`opt ... | head`), and not some other pipe."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
