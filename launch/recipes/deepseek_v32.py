"""DeepSeek-V3.2's post-training: specialists by RL write the data of one generalist, which one mixed RL stage finishes.

After https://arxiv.org/abs/2512.02556, section 3:

    base --RL on domain d--> specialist d                        for every domain
    specialist d --answers prompts of d--> generated
    generated --verifiers, filters--> kept
    base --SFT on what is kept of all domains--> generalist
    generalist --one RL stage on all domains mixed--> final

The paper has six domains (and writing and general questions), each with and without thinking, "large-scale" RL for
every specialist, thousands of steps of mixed RL, and for the general agent 1,827 synthesised environments with 4,417
tasks. Here a domain is a source of tasks that a program judges. There are three, and each of their prompts (the tiny
base: some 350 of 512 strings of three letters) is used as the paper uses its environments, by the domain's specialist
and again in the mixed stage. No thinking, no tools: what stays is the order of the stages, and who writes whose data.

The claim to look at: the generalist is marginally below each specialist in its domain, and the last stage closes the
gap. On the tiny base (two minutes on a busy core, one seed) specialists reach 99, 86 and 100% of the held-out prompts
of their own domains, the generalist 96, 100 and 100%, and 100, 98 and 98% after the last stage. SmolLM2-135M-Instruct
(12 minutes of processor time): 93, 60 and 25%, then 100, 68 and 33%, then 100, 78 and 30%. There the data alone closes
the gap: 96 short answers that passed are a better lesson than eight steps of RL.
"""

from typing import Literal

from ...data.conversations import Rows
from ...data.filters import duplicates, outcome
from ...data.filters.funnel import Filter
from ...data.task import TaskSource
from ...data.tasks import Mixture, parts
from ...train.answers import Local
from ...train.convert import Convert
from ...train.curate import Curate
from ...train.evaluate import Evaluate
from ...train.generate import Generate
from ...train.rl import RL
from ...train.sft import SFT
from ..comparison import Comparison, Entry
from ..recipe import Run
from . import engine_scales


def filters(held_out: tuple[TaskSource, ...], keep: int) -> tuple[Filter, ...]:
    """What a specialist's answer has to pass, in this order."""
    return (
        *engine_scales.sound(held_out),
        duplicates.NearDuplicateResponses(),
        outcome.ShortestCorrect(count=keep),
    )


def recipe(
    run: Run, *, base: Literal["tiny", "smollm2", "llama3.1-8b", "qwen2.5-32b", "llama3.1-70b"] = "tiny"
) -> Comparison:
    """Specialists by RL, their data, one generalist by SFT, one mixed RL stage.

    Args:
        run: trains (or plans) a stage and returns its folder.
        base: the model to start from; "tiny" is made on the spot and takes minutes; the large ones are shapes to plan
            with.
    """
    scale = engine_scales.SCALES[base]
    prompts, held_out = parts(*scale.domains)

    def score(name: str, model: str) -> str:
        return run(f"eval-{name}", Evaluate(model=model, tasks=held_out, **scale.evaluate))

    start = run("start", scale.start(prompts) if scale.start else Convert(source=base))
    entries = [Entry("start", score("start", start), ())]

    specialists: dict[str, str] = {}
    for tasks in prompts:
        model = run(f"specialist-{tasks.domain}", RL(start=start, tasks=tasks, **scale.rl))
        entries.append(Entry(f"specialist-{tasks.domain}", score(tasks.domain, model), (model,)))
        specialists[tasks.domain] = model

    teachers = {domain: Local(model=model) for domain, model in specialists.items()}
    generated = run("generated", Generate(prompts=prompts, teachers=teachers, **scale.generate))
    kept = run("kept", Curate(rows=(generated,), filters=filters(held_out, scale.keep)))

    stage = SFT(start=start, data=Rows(folders=(kept,)), optimizer=scale.high, **scale.sft)
    generalist = run("generalist", stage)
    entries.append(Entry("generalist", score("generalist", generalist), (*specialists.values(), generated, generalist)))

    mixed = Mixture(sources=prompts, weights=(1.0,) * len(prompts), size=scale.mixture)
    final = run("mixed-rl", RL(start=generalist, tasks=mixed, **scale.mixed_rl))
    entries.append(Entry("generalist after mixed RL", score("mixed-rl", final), (final,)))
    return Comparison(
        title=f"DeepSeek-V3.2's post-training of {base}",
        entries=tuple(entries),
        teachers={domain: f"specialist-{domain}" for domain in specialists},
    )
