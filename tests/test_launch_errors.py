"""Every error message that Cloud TPU is known to give: what it is, and whether a launcher tries again."""

import pytest

from posttrain.launch.tpu.errors import Act, classify

MESSAGES = [
    (
        'code 8: There is no more capacity in the zone "us-central2-b"; you can try in another zone where Cloud TPU '
        "Nodes are offered (see https://cloud.google.com/tpu/docs/regions) [EID: 0x8f2]",
        "stockout",
        Act.ELSEWHERE,
    ),
    ("Atomic resize failed with [GCE_STOCKOUT]", "stockout", Act.ELSEWHERE),
    ("ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "stockout", Act.ELSEWHERE),
    (
        "code 9: Insufficient reserved capacity. Contact customer support to increase your reservation. [EID: 0x1]",
        "reservation",
        Act.STOP,
    ),
    (
        "Quota 'TPUV2sPreemptiblePodPerProjectPerZoneForTPUAPI' exhausted. Limit 32 in zone europe-west4-a",
        "quota",
        Act.STOP,
    ),
    (
        "RESOURCE_EXHAUSTED: Quota limit 'TPUV2sPodPerProjectPerRegionForTPUAPI,TPUV2sPodPerProjectPerZoneForTPUAPI' "
        "has been exceeded. Limit: 0,0 in region us-central1,zone us-central1-a.",
        "quota",
        Act.STOP,
    ),
    ("HTTPError 429: RESOURCE_EXHAUSTED", "quota", Act.STOP),
    (
        'code 3: FLEX_START provisioning model is not supported for accelerator type "v6e-1" in location '
        '"us-central1-b"',
        "flex",
        Act.STOP,
    ),
    (
        "INVALID_ARGUMENT: Cloud TPU received a bad request. The requested accelerator configuration for accelerator "
        'type, "v6e-4", could not be found in the zonal accelerator configurations for "us-east1-d".; the accelerator '
        "v6e-4 was not found in zone us-east1-d",
        "hardware",
        Act.STOP,
    ),
    ('The requested zone "us-nowhere1-a" is not supported.', "hardware", Act.STOP),
    (
        "code 3: Cloud TPU received a bad request. update is not supported while in state PREEMPTED",
        "preempted",
        Act.ELSEWHERE,
    ),
    ("STANDARD provisioning model is incompatible with spot requests", "sdk", Act.STOP),
    ("Quota 'IN_USE_ADDRESSES' exceeded. Limit: 8.0 in region us-east5.", "addresses", Act.STOP),
    ("INVALID_ARGUMENT: Cloud TPU was unable to complete the operation.", "multislice", Act.STOP),
    ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "permission", Act.STOP),
    ("reason: NO_VALID_BILLING_ACCOUNT", "billing", Act.STOP),
    ("billingEnabled: false", "billing", Act.STOP),
    ("ssh exited with return code [255].", "ssh", Act.HERE),
    ("ssh: connect to host 34.1.2.3 port 22: Operation timed out", "ssh", Act.HERE),
    ("Currently unable to connect to this TPU using IAP", "ssh", Act.HERE),
    (
        "ABORTED: The TPU is already in use by process with pid 71. Not attempting to load libtpu.so in this process.",
        "held",
        Act.STOP,
    ),
    (
        'Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".',
        "held",
        Act.STOP,
    ),
    ("DeleteQueuedResource is not supported when state is PROVISIONING", "undeletable", Act.HERE),
    ("ALREADY_EXISTS: Resource 'first' already exists", "exists", Act.STOP),
    ("NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/first' was not found", "absent", Act.STOP),
    (
        "ERROR: (gcloud.storage.cat) The following URLs matched no objects or files:\ngs://bucket/launch.json",
        "absent",
        Act.STOP,
    ),
    ("You do not currently have an active account selected.", "login", Act.STOP),
    ("There was a problem refreshing your current auth tokens: ('invalid_grant: Bad Request')", "login", Act.STOP),
    ("Cloud TPU API has not been used in project 12 before or it is disabled. SERVICE_DISABLED", "disabled", Act.STOP),
    ("UNAVAILABLE: The service is currently unavailable.", "network", Act.HERE),
    ("gcloud took longer than 120 seconds", "network", Act.HERE),
]


@pytest.mark.parametrize(("text", "kind", "act"), MESSAGES, ids=[f"{one[1]}{i}" for i, one in enumerate(MESSAGES)])
def test_a_message_is_recognised(text, kind, act):
    found = classify(text)
    assert (found.kind, found.act) == (kind, act)
    assert found.advice
    assert found.text in str(found)  # gcloud's own words stay, with the error id


def test_the_quota_is_named():
    found = classify(MESSAGES[4][0])
    assert "the project's quota TPUV2sPreemptiblePodPerProjectPerZoneForTPUAPI does not allow" in str(found)


def test_what_nobody_knows_is_shown_as_it_came():
    found = classify("code 13: something new\n  [EID: 0xbeef]")
    assert (found.kind, found.act) == ("unknown", Act.STOP)
    assert str(found) == "gcloud said: code 13: something new [EID: 0xbeef]"
