"""What gcloud's error messages mean for a launch: try again here, try elsewhere, or stop and explain.

The strings are those that Cloud TPU was seen to give. What matches none is shown as it came, with its error id.
"""

import re
from dataclasses import dataclass
from enum import StrEnum


class Act(StrEnum):
    """What a launcher does about a failure."""

    HERE = "try again here"
    ELSEWHERE = "try elsewhere"
    STOP = "stop and explain"


@dataclass(frozen=True)
class Problem:
    """A failure: its kind, what to do about it, what it means for a person, and gcloud's own words."""

    kind: str
    act: Act
    advice: str
    text: str

    def __str__(self) -> str:
        return f"{self.advice}; gcloud said: {self.text}" if self.advice else f"gcloud said: {self.text}"


CLASSES: tuple[tuple[str, str, Act, str], ...] = (
    # kind, pattern, act, advice; the first that matches counts
    (
        "stockout",
        r"no more capacity in the zone|GCE_STOCKOUT|ZONE_RESOURCE_POOL_EXHAUSTED",
        Act.ELSEWHERE,
        "the zone has no such TPUs left at the moment",
    ),
    (
        "reservation",
        r"Insufficient reserved capacity",
        Act.STOP,
        "the reservation has no room for these slices, or the zone sells this type to reservations only (v5p: seen "
        "without any reservation, too): enlarge the reservation, or try another zone or --spot",
    ),
    (
        "flex",
        r"FLEX_START provisioning model is not supported",
        Act.STOP,
        "this zone has no flex-start capacity of this type, whatever quota and price list say: take another zone, or "
        "--spot instead of --flex",
    ),
    (
        "addresses",
        r"IN_USE_ADDRESSES",
        Act.STOP,
        "every host takes an external address and the region allows no more: use --internal-ips with Private Google "
        "Access and Cloud NAT, or ask for a larger quota of IN_USE_ADDRESSES",
    ),
    (
        "busy",
        r"RATE_LIMIT_EXCEEDED|[Qq]uota exceeded for quota metric .* per minute",
        Act.HERE,
        "the API asks for slower calls",
    ),
    (
        "quota",
        r"Quota '(?P<id>[\w-]+)' exhausted|Quota limit '(?P<older>[^']+)' has been exceeded|google\.rpc\.QuotaFailure|"
        r"HTTP(Error)? 429",
        Act.STOP,
        "the project's quota{of} does not allow these slices: ask for more at "
        "console.cloud.google.com/iam-admin/quotas (spot and flex-start use the preemptible quota)",
    ),
    (
        "hardware",
        r"could not be found in the zonal accelerator configurations|was not found in zone|"
        r'requested zone "[^"]*" is not supported',
        Act.STOP,
        "the zone does not have this type: `gcloud compute tpus accelerator-types list --zone ZONE` shows what it has",
    ),
    (
        "preempted",
        r"not supported while in state PREEMPTED",
        Act.ELSEWHERE,
        "the slice was preempted while it was made",
    ),
    (
        "sdk",
        r"STANDARD provisioning model is incompatible with spot requests",
        Act.STOP,
        "this gcloud is too old to ask for spot capacity: run `gcloud components update`",
    ),
    (
        "undeletable",
        r"DeleteQueuedResource is not supported when state is",
        Act.HERE,
        "a resource cannot be deleted while it is being provisioned",
    ),
    ("exists", r"ALREADY_EXISTS|already exists", Act.STOP, "the name is taken in this zone: give another --name"),
    (
        "billing",
        r"NO_VALID_BILLING_ACCOUNT|billingEnabled: false|BILLING_DISABLED|billing (account|to be enabled)",
        Act.STOP,
        "the project has no billing account: link one with `gcloud billing projects link`",
    ),
    (
        "login",
        r"do not currently have an active account|refreshing (your current )?auth tokens|Reauthentication|"
        r"invalid_grant|UNAUTHENTICATED",
        Act.STOP,
        "gcloud is not logged in any more: run `gcloud auth login`, then go on with `posttrain attach`",
    ),
    (
        "disabled",
        r"SERVICE_DISABLED|API has not been used in project|is not enabled on project",
        Act.STOP,
        "the Cloud TPU API is off: run `gcloud services enable tpu.googleapis.com`",
    ),
    (
        "permission",
        r"PERMISSION_DENIED|does not have (permission|storage\.)|\b403\b",
        Act.STOP,
        "the account may not do this: it needs roles/tpu.admin in the project, roles/iam.serviceAccountUser on the "
        "hosts' service account, and roles/storage.objectAdmin on the bucket",
    ),
    (
        "host",
        r"posttrain-refused: (?P<why>[^\n]*)",
        Act.STOP,
        "a host cannot run this: {why}",
    ),
    (
        "held",
        r"TPU is already in use by process|libtpu multi-process lockfile",
        Act.STOP,
        "another process on the host holds the TPU: find it with `sudo lsof -w /dev/vfio/* /dev/accel*`",
    ),
    (
        "multislice",
        r"INVALID_ARGUMENT: Cloud TPU was unable to complete the operation",
        Act.STOP,
        "the API gives no reason; seen for several slices of a type that cannot be joined",
    ),
    (
        "ssh",
        r"return code \[255\]|exit status 255|port 22: |unable to connect to this TPU using IAP|"
        r"Connection (refused|reset|closed|timed out)|kex_exchange_identification",
        Act.HERE,
        "a host does not answer: if none ever does, run `ssh-add ~/.ssh/google_compute_engine`, open port 22 in the "
        "firewall, or go through --iap",
    ),
    (
        "absent",
        r"NOT_FOUND|not found|could not be found|matched no objects|\b404\b",
        Act.STOP,
        "there is nothing of that name",
    ),
    (
        "network",
        r"UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL\b|ABORTED|Could not (reach|resolve)|Unable to find the server|"
        r"Max retries exceeded|took longer than|\b50[0234]\b",
        Act.HERE,
        "Google Cloud did not answer properly",
    ),
)


def classify(text: str) -> Problem:
    """The problem that a message of gcloud tells."""
    said = " ".join(text.split())
    for kind, pattern, act, advice in CLASSES:
        found = re.search(pattern, text)
        if found:
            names = {key: value for key, value in found.groupdict().items() if value}
            quota = names.get("id") or names.get("older", "").split(",")[0]
            why = names.get("why", "")
            return Problem(kind, act, advice.format(of=f" {quota}" if quota else "", why=why), said)
    return Problem("unknown", Act.STOP, "", said or "nothing")
