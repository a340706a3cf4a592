"""Olmo 3's supervised stage: external teachers answer, little is kept, two learning rates are averaged.

After Olmo 3 Think (https://arxiv.org/abs/2512.13961, section 4.2):

    curated prompts --teacher answers, verifiers judge--> generated
    generated --filters--> kept
    start --SFT at a high learning rate--> high
    start --SFT at a low learning rate---> low           for every seed
    high, low --mean--> average

The teacher is any OpenAI-compatible endpoint, or a stronger checkpoint on the mesh. Evaluated are the start, the
teacher, both parents and their average. (The paper compares the average with neither parent.) The paper's prompts are
millions, of maths, code, chat, safety and more, with a teacher for each; here they are three sources of tasks that a
program judges, of a few hundred prompts at the tiny scale, and one teacher.

On the tiny base (a minute and a half on a busy core, three seeds) the mean over three domains of held-out prompts is
37% at the start, 99% for the teacher, 96% at the high rate, 75% at the low one, 92% for their average: no gain there.
With SmolLM2-135M-Instruct (11 minutes of processor time, one seed) it is 12%, 50%, 53%, 50% and 56%: the average is
above both parents, by less than what 27 to 40 prompts a domain can tell.
"""

from typing import Literal

from ...data.conversations import Rows
from ...data.endpoint import Endpoint
from ...data.filters import outcome, wording
from ...data.filters.funnel import Filter
from ...data.task import TaskSource
from ...data.tasks import parts
from ...train import merge
from ...train.answers import Local
from ...train.convert import Convert
from ...train.curate import Curate
from ...train.evaluate import Evaluate, OverSeeds
from ...train.generate import ANY, Generate
from ...train.sft import SFT
from ..comparison import Comparison, Entry
from ..recipe import Run
from . import engine_scales


def filters(held_out: tuple[TaskSource, ...], keep: int) -> tuple[Filter, ...]:
    """What a row has to pass, in this order: section 4.2.1 and appendix A.7."""
    return (
        *engine_scales.sound(held_out),
        wording.Refusals(),
        wording.Identity(),
        wording.KnowledgeDates(),
        outcome.ShortestCorrect(count=keep),
    )


def recipe(
    run: Run,
    *,
    base: Literal["tiny", "smollm2", "llama3.1-8b", "qwen2.5-32b", "llama3.1-70b"] = "tiny",
    endpoint: str = "",
    endpoint_model: str = "",
    key_variable: str = "",
    seeds: int | None = None,
) -> Comparison:
    """Prompts, a teacher, verifiers and filters, SFT at two learning rates, their average.

    Args:
        run: trains (or plans) a stage and returns its folder.
        base: the model to start from; "tiny" is made on the spot and takes minutes; the large ones are shapes to plan
            with.
        endpoint: url of an OpenAI-compatible API whose model teaches; a stronger checkpoint is trained where none is
            given.
        endpoint_model: the model's name there.
        key_variable: name of the environment variable with the endpoint's key.
        seeds: how often the models are trained, on other orders of the data; unless told 3 for "tiny", else 1.
    """
    scale = engine_scales.SCALES[base]
    prompts, held_out = parts(*scale.domains)
    seeds = (3 if base == "tiny" else 1) if seeds is None else seeds
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: train with at least one")

    def score(name: str, model: str) -> str:
        return run(f"eval-{name}", Evaluate(model=model, tasks=held_out, **scale.evaluate))

    start = run("start", scale.start(prompts) if scale.start else Convert(source=base))
    entries = [Entry("start", score("start", start), ())]
    if endpoint:
        teacher = Endpoint(url=endpoint, model=endpoint_model, key_variable=key_variable)
    else:
        stronger = run("teacher", scale.teacher(start, prompts))
        teacher = Local(model=stronger)
        entries.append(Entry("teacher", score("teacher", stronger), (stronger,)))

    generated = run("generated", Generate(prompts=prompts, teachers={ANY: teacher}, **scale.generate))
    kept = run("kept", Curate(rows=(generated,), filters=filters(held_out, scale.keep)))

    scores: dict[str, list[str]] = {"high": [], "low": [], "average": []}
    stages: dict[str, list[str]] = {"high": [], "low": [], "average": []}
    for seed in range(seeds):
        models: dict[str, str] = {}
        for name, rate in (("high", scale.high), ("low", scale.low)):
            stage = SFT(start=start, data=Rows(folders=(kept,)), optimizer=rate, seed=seed, **scale.sft)
            models[name] = run(f"sft-{name}-{seed}", stage)
        models["average"] = run(f"average-{seed}", merge.Linear(models=(models["high"], models["low"])))
        for name, model in models.items():
            scores[name].append(score(f"{name}-{seed}", model))
            stages[name].append(model)
    for name, found in scores.items():
        pooled = run(f"scores-{name}", OverSeeds(evaluations=tuple(found)))
        entries.append(Entry(f"SFT {name}", pooled, (generated, *stages[name])))
    return Comparison(
        title=f"Olmo 3's SFT on {base}, {seeds} seed{'s' if seeds > 1 else ''}",
        entries=tuple(entries),
        teachers={} if endpoint else {one.domain: "teacher" for one in prompts},
    )
