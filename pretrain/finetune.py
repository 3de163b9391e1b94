"""`opt finetune`: a pretrained model, shards and a task become a run; the same command again goes on with it.

    model --its config names the task, heads it lacks are new--> system --the trainer of pretraining--> out/model

The rows of each task are in opt/systems/opt/downstream.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tyro.conf import Positional

from opt.checkpoint import from_pretrained, read_history
from opt.config import UserError, read_json
from opt.data.plan import Plan
from opt.data.questions import TRUTHS, Question, Questions, frequent_answers, normalise
from opt.data.shards import ShardReader
from opt.data.subset import Subset
from opt.data.tokenizer import Tokenizer
from opt.history import Stage, corpora_of
from opt.objectives.term import loss
from opt.recipe import LoopConfig, OptimConfig
from opt.systems.opt import OPT
from opt.systems.shared.asking import Answering
from opt.systems.shared.tuning import Tuning
from opt.systems.system import Progress, System, build
from pretrain.limits import check
from pretrain.parallel import processes, say
from pretrain.run import train

ALIGNED = ("retrieval-in-batch", "retrieval-hard")
"""Tasks that need the shared space."""
ASKING = ("vqa-classes", "vqa-words", "nlvr2")
"""Tasks that need questions."""
NEW_HEADS = ("align.", "temperature.", "answer_head.")
"""What a task may need and a model may lack."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What to tune a model for, on what, where to, and how."""

    task: Positional[Literal[
        "captioning", "retrieval-margin", "retrieval-in-batch", "retrieval-hard", "vqa-classes", "vqa-words",
        "nlvr2",
    ]]
    """captioning: write captions of pictures. retrieval-margin: rank true pairs of text and picture above false ones.
    retrieval-in-batch: find text, picture and speech from each other. retrieval-hard: the same, and matching learns
    from the pairs that this mistakes, which is what retrieval in two stages wants. vqa-classes: answer questions from a
    list. vqa-words: answer questions in words. nlvr2: tell true sentences about two pictures from false ones."""
    model: Path
    """Folder of a saved model, such as runs/demo/model."""
    shards: Path
    """Folder that `opt extract` wrote."""
    out: Path
    """The run's folder. The same command again goes on from its newest checkpoint."""
    questions: Path | None = None
    """vqa: lines {"image_id": ..., "question": ..., "answers": [...]} about the pictures of the shards. nlvr2: the same
    with sentences, answered by true or false; two pictures are "image_ids": [..., ...], or one record's."""
    answers: int = 3129
    """vqa-classes: length of the list, the most frequent answers of the questions (gap A22)."""
    given: tuple[Literal["image", "audio"], ...] = ("image",)
    """captioning: what captions are written from."""
    margin: float = 0.2
    """retrieval-margin: how much likelier a true pair must be than a false one (gap A18)."""
    alignment_width: int = 128
    """retrieval-in-batch, -hard: width of the shared space, where the model has none yet."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=5e-5))
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, into the run's folder."""
    profile: int = 0
    """Trace so many steps, after three, into the run's folder: profile/trace.json for chrome://tracing or Perfetto."""
    dry_run: bool = False
    """Say what would be trained, what memory, disk and time it takes, and stop."""


def finetune(config: FinetuneConfig) -> None:
    """Tune a pretrained model for one use; run the same command again to go on after any stop.

    The learning rate is meant for the paper's size; small models take about a third of the rate of their pretraining.
    A linear probe needs no tuning: `opt eval classify` fits one on frozen features. Example:

        opt finetune vqa-classes --model runs/demo/model --shards runs/demo/shards/train --out runs/vqa
        --questions runs/demo/scenes/train_questions.jsonl --loop.steps 600 --optim.learning-rate 3e-4
    """
    _check(config)
    start = from_pretrained(config.model)
    preset = "trimodal" if getattr(start.config, "hears", False) else "tiny"
    if not hasattr(start.config, "tuning"):
        raise UserError(f"{config.model} holds a model of system {start.name!r}, which has nothing to tune; go on with "
                        f"its pretraining: `opt pretrain {start.name}.{preset} --start model:{config.model}`")
    with processes() as device:
        reader = _reader(config, start)
        tuning = _tuning(config, start, reader)
        system = tuned(start, tuning, config)
        if isinstance(reader, Questions):
            tuning.require(reader.sample(0))
        if isinstance(system, Answering):
            _freeze_unused(system, reader)
        model = read_json(config.model / "config.json")["sha256"]
        stage = Stage("finetune", config.task, corpora_of(reader), f"model {model}")
        train(system, reader, config, device, (*read_history(config.model), stage), f"model {model}")


def tuned(start: System, tuning: Tuning, config: FinetuneConfig) -> System:
    """The same model with the task in its configuration; heads that it lacks are new, seeded by the loop's seed."""
    model = dataclasses.replace(start.config, tuning=tuning)
    if config.task in ALIGNED and isinstance(start, OPT) and start.align is None:
        model = dataclasses.replace(model, alignment_weight=1.0, alignment_width=config.alignment_width)
    torch.manual_seed(config.loop.seed)
    system = build(start.name, model, start.tokenizer, start.facts)
    before = start.config.tuning
    same_list = (tuning.answers, tuning.pictures) == (before.answers, before.pictures)
    kept = {name: weight for name, weight in start.state_dict().items()
            if same_list or not name.startswith("answer_head.")}
    missing, unexpected = system.load_state_dict(kept, strict=False)
    assert not unexpected and all(name.startswith(NEW_HEADS) for name in missing), (missing, unexpected)
    if missing:
        heads = sorted({name.partition(".")[0] for name in missing})
        answers = f", over {len(tuning.answers):,} answers" if "answer_head" in heads else ""
        say(f"new in this model: {', '.join(heads)}{answers}")
    return system


def _freeze_unused(system: System, reader: ShardReader) -> None:
    """Parts that the task does not reach stay as they are: found by the gradients of one question."""
    rows = system.preparer()
    plan = Plan(0, np.ones(1, np.int64), 1, rows.tasks, np.zeros(1, np.uint64), 1).batch_at(0)
    output = system(rows({0: reader.sample(0, jpeg=True)}, plan), Progress(0, 0.0))
    loss(output.terms).backward()
    unused = [parameter for parameter in system.parameters() if parameter.requires_grad and parameter.grad is None]
    for parameter in unused:
        parameter.requires_grad_(False)
    system.zero_grad()
    if unused:
        count = sum(parameter.numel() for parameter in unused)
        say(f"{count:,} parameters are not reached by it, and stay as they are")


def _check(config: FinetuneConfig) -> None:
    """Raises UserError for settings that the task cannot use."""
    check(config)
    check(config.loop, "loop")
    if config.loop.validate_every or config.loop.patience:
        raise UserError("fine-tuning validates nothing; leave out --loop.validate-every and --loop.patience")
    check(config.optim, "optim")
    if config.task in ASKING and config.questions is None:
        raise UserError(f"{config.task} needs --questions: lines of questions and answers about the pictures")
    if config.task not in ASKING and config.questions is not None:
        raise UserError(f"{config.task} reads no --questions; leave them out, or choose {', '.join(ASKING)}")
    if config.answers < 1 or config.alignment_width < 1:
        raise UserError(f"--answers {config.answers} --alignment-width {config.alignment_width}: must be at least 1")
    if not 0 <= config.margin < 1:
        raise UserError(f"--margin {config.margin} must be at least 0 and below 1: it is a distance of probabilities")
    if not config.given or len(set(config.given)) < len(config.given):
        raise UserError(f"--given {' '.join(config.given)}: name image, audio or both, each once")


def _reader(config: FinetuneConfig, start: System) -> ShardReader:
    """The samples, or questions, that the task can use; says how many it cannot. Raises UserError when none is left."""
    whole, sees = ShardReader(config.shards), "pictures" if start.preparer().jpeg else "regions"
    start.require_same(whole.manifest, config.shards)
    if config.questions is not None:
        seen = whole.lengths.jpegs if sees == "pictures" else whole.lengths.regions
        if not seen.any():
            raise UserError(f"{config.shards} holds no {sees}, without which questions would be answered blindly; "
                            "extract again with them")
        questions = Questions(whole, config.questions, answered=True)
        if questions.left_out:
            say(questions.left_out)
        return questions
    sizes = whole.lengths
    has = {"text": sizes.words > 0, "image": sizes.regions > 0, "audio": sizes.frames > 0}
    if config.task in ALIGNED:
        useful, need = np.sum(list(has.values()), axis=0) >= 2, "two of text, picture and speech"
    else:
        needed = ("text", *(config.given if config.task == "captioning" else ("image",)))
        useful, need = np.all([has[name] for name in needed], axis=0), " and ".join(needed)
    if not useful.any():
        raise UserError(f"{config.shards} holds no sample with {need}, which {config.task} needs")
    if not useful.all():
        say(f"{(~useful).sum():,} of {len(whole):,} samples lack {need}: left out")
    return Subset(whole, np.flatnonzero(useful))


def _tuning(config: FinetuneConfig, start: System, reader: ShardReader) -> Tuning:
    """The task and its settings; the list of answers stays the model's own unless this task makes one."""
    answers, pictures = start.config.tuning.answers, start.config.tuning.pictures
    if config.task == "vqa-classes":
        assert isinstance(reader, Questions)
        answers, pictures = frequent_answers(reader.questions, config.answers), 1
        say(_coverage(reader.questions, answers))
    if config.task == "vqa-words":
        assert isinstance(reader, Questions)
        say(_spelling(reader.questions, start.tokenizer))
    if config.task == "nlvr2":
        assert isinstance(reader, Questions)
        answers, pictures = TRUTHS, 2
        _check_truths(reader.questions)
    return Tuning(config.task, config.given, config.margin, answers, pictures)


def _check_truths(statements: list[Question]) -> None:
    """Raises UserError where an answer is neither true nor false."""
    for statement in statements:
        if wrong := next((answer for answer in statement.answers if normalise(answer) not in TRUTHS), None):
            raise UserError(f"--questions: {statement.text!r:.80} is answered by {wrong!r:.40}; nlvr2 tells true from "
                            "false, choose vqa-classes or vqa-words for other answers")


def _coverage(questions: list[Question], answers: tuple[str, ...]) -> str:
    known = set(answers)
    covered = sum(bool(known.intersection(map(normalise, question.answers))) for question in questions)
    return f"{len(answers):,} answers cover {covered:,} of {len(questions):,} questions"


def _spelling(questions: list[Question], tokenizer: Tokenizer) -> str:
    """Captions may lack characters that answers need, digits most of all."""
    spelled = {answer: tokenizer.unk not in tokenizer.encode(answer)
               for answer in {answer for question in questions for answer in question.answers}}
    can = sum(any(spelled[answer] for answer in question.answers) for question in questions)
    return f"the model's vocabulary spells an answer to {can:,} of {len(questions):,} questions"
