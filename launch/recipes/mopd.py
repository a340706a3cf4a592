"""Multi-teacher on-policy distillation: one RL specialist per domain, then one student that learns from all of them.

After MiMo-V2-Flash (https://arxiv.org/abs/2601.02780, section 4):

    start --RL on domain d--> specialist d        for every domain
    start --MOPD from all specialists--> student
    specialists --mean, TIES--> merged            what the student is compared with

Every model is then evaluated on held-out tasks of every domain.
"""

from typing import Literal

from ...data.tasks import Mixture, parts
from ...train import distill, merge, teaching
from ...train.convert import Convert
from ...train.evaluate import Evaluate
from ...train.rl import RL
from ..comparison import Comparison, Entry
from ..recipe import Run
from . import mopd_scales

OBJECTIVES = {"full": teaching.FullVocabulary, "sampled": teaching.SampledToken}


def recipe(
    run: Run,
    *,
    base: Literal["smollm2", "tiny", "llama3.1-8b", "qwen2.5-32b", "llama3.1-70b"] = "smollm2",
    objective: Literal["full", "sampled", "both"] | None = None,
    outcome: float = 0.0,
) -> Comparison:
    """Specialists by RL, then merges and a MOPD student, compared on held-out tasks.

    Args:
        run: trains (or plans) a stage and returns its folder.
        base: the model to start from; "tiny" is made on the spot and takes minutes; the large ones are
            shapes to plan with.
        objective: full-vocabulary or sampled-token distillation, or a student of each; "full", and "both" for "tiny",
            unless told.
        outcome: weight of the outcome advantage beside the teacher's term.
    """
    scale = mopd_scales.SCALES[base]
    prompts, held_out = parts(*scale.domains)
    train = {tasks.domain: tasks for tasks in prompts}
    forms = ["full", "sampled"] if objective == "both" else [objective or "full"]
    if objective is None and base == "tiny":
        forms = ["full", "sampled"]

    def score(name: str, model: str) -> str:
        return run(f"eval-{name}", Evaluate(model=model, tasks=held_out, **scale.evaluate))

    start = run("start", scale.start(prompts) if scale.start else Convert(source=base))
    entries = [Entry("start", score("start", start), ())]

    specialists: dict[str, str] = {}
    for domain, tasks in train.items():
        specialists[domain] = run(f"specialist-{domain}", RL(start=start, tasks=tasks, **scale.rl))
        entries.append(Entry(f"specialist-{domain}", score(domain, specialists[domain]), (specialists[domain],)))

    models = tuple(specialists.values())
    merges = {"mean": merge.Linear(models=models), "ties": merge.Ties(models=models, base=start, **scale.ties)}
    for name, stage in merges.items():
        merged = run(f"merge-{name}", stage)
        entries.append(Entry(f"merge-{name}", score(name, merged), (merged,)))

    mixed = Mixture(sources=prompts, weights=(1.0,) * len(prompts), size=scale.mixture)
    for form in forms:
        student = run(
            f"mopd-{form}",
            distill.Distill(
                start=start,
                teachers=specialists,
                tasks=mixed,
                objective=OBJECTIVES[form](outcome=outcome),
                **scale.distill[form],
            ),
        )
        entries.append(Entry(f"mopd-{form}", score(f"mopd-{form}", student), (student,)))
    return Comparison(
        title=f"Multi-teacher on-policy distillation of {base}",
        entries=tuple(entries),
        teachers={domain: f"specialist-{domain}" for domain in specialists},
    )
