"""Rejection sampling, round after round: a model answers, its best answers of all rounds teach it, it answers again.

After Llama 2 (https://arxiv.org/abs/2307.09288, section 3.2.3), whose later rounds keep the winners of the earlier
ones, because the model forgot otherwise. Each round trains the start anew, as in https://arxiv.org/abs/2203.14465.
The same answers end as preferences, as Llama 3 has it (https://arxiv.org/abs/2407.21783, section 4.1.4).

    model t-1 --K answers a prompt, judged--> generated t
    generated 1 ... t --filters, the best of each prompt--> winners t
    start --SFT on winners t--> model t
    generated 1 ... T --a right and a wrong answer to each prompt--> pairs
    model T --DPO on pairs--> preferred

On the tiny base (a minute on 2 cores, one seed) the mean over three domains of held-out prompts goes from 37% to 94, 95
and 96% in three rounds, and to 98% with DPO.
"""

from typing import Literal

from ...data.conversations import Rows
from ...data.filters import outcome
from ...data.preferences import Paired
from ...data.tasks import parts
from ...train.answers import Local
from ...train.convert import Convert
from ...train.curate import BestAndWorst, Curate, Pair
from ...train.evaluate import Evaluate
from ...train.generate import ANY, Generate
from ...train.prefer import Prefer
from ...train.sft import SFT
from ..comparison import Comparison, Entry
from ..recipe import Run
from . import engine_scales


def recipe(
    run: Run,
    *,
    base: Literal["tiny", "smollm2", "llama3.1-8b", "qwen2.5-32b", "llama3.1-70b"] = "tiny",
    rounds: int = 3,
) -> Comparison:
    """Rounds of answers, winners and fine-tuning, then preferences, each scored on held-out tasks.

    Args:
        run: trains (or plans) a stage and returns its folder.
        base: the model to start from; "tiny" is made on the spot and takes minutes; the large ones are shapes to plan
            with.
        rounds: how often the model answers.
    """
    scale = engine_scales.SCALES[base]
    prompts, held_out = parts(*scale.domains)
    winning = (*engine_scales.sound(held_out), outcome.ShortestCorrect(count=1))

    def score(name: str, model: str) -> str:
        return run(f"eval-{name}", Evaluate(model=model, tasks=held_out, **scale.evaluate))

    start = run("start", scale.start(prompts) if scale.start else Convert(source=base))
    entries, generated, model = [Entry("start", score("start", start), ())], (), start
    for number in range(1, rounds + 1):
        asked = Generate(prompts=prompts, teachers={ANY: Local(model=model)}, seed=number, **scale.generate)
        generated = (*generated, run(f"generated-{number}", asked))
        winners = run(f"winners-{number}", Curate(rows=generated, filters=winning))
        stage = SFT(start=start, data=Rows(folders=(winners,)), optimizer=scale.high, **scale.sft)
        model = run(f"model-{number}", stage)
        entries.append(Entry(f"round {number}", score(f"{number}", model), (generated[-1], model)))
    pairs = run("pairs", Pair(rows=generated, pairing=BestAndWorst()))
    preferred = run("preferred", Prefer(start=model, data=Paired(folders=(pairs,)), **scale.prefer))
    entries.append(Entry("DPO on right and wrong", score("preferred", preferred), (preferred,)))
    return Comparison(title=f"Rejection sampling from {base}", entries=tuple(entries), teachers={})
