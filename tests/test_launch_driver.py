"""Launches in a fake cloud, played by a `gcloud` on the PATH: how they end, what they leave, what a user can do."""

import threading

import fake_cloud
import pytest

from posttrain.launch.tpu import driver, record
from posttrain.launch.tpu.lifecycle import Action

STOCKOUT = (
    'RESOURCE_EXHAUSTED: code 8: There is no more capacity in the zone "us-east5-b"; you can try in another zone where '
    "Cloud TPU Nodes are offered (see https://cloud.google.com/tpu/docs/regions) [EID: 0x1a2b]"
)
FAILED = {"state": "FAILED", "stateInitiator": "SERVICE", "failedData": {"error": {"code": 8, "message": STOCKOUT}}}


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    return fake_cloud.FakeCloud(tmp_path, monkeypatch)


def report_in(cloud):
    folder = cloud.folder / "bucket/bucket/runs/first"
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("fine")
    (folder / "report.json").write_text("{}")


def test_a_launch_that_meets_no_trouble_fetches_its_report_and_leaves_nothing(cloud):
    report_in(cloud.plays())
    one = driver.drive(cloud.launch(), cloud.world)
    assert (one.state.outcome, one.state.exists, one.over) == ("done", False, True)
    assert cloud.resources == {}
    assert (cloud.folder / "fetched/report.html").read_text() == "fine"
    assert (one.folder / "log").read_text().startswith("step 0\n")
    assert record.load("first") == one


def test_stocked_out_three_times_then_active(cloud):
    report_in(cloud.plays(lives=[{"refused": STOCKOUT}, {"states": [FAILED]}, {"states": ["ACCEPTED", FAILED]}, {}]))
    begin = cloud.clock.seconds
    one = driver.drive(cloud.launch(), cloud.world)
    assert one.state.outcome == "done"
    assert len(cloud.calls("queued-resources create")) == 4
    assert cloud.clock.seconds - begin >= 60 + 120 + 240  # never hammered
    assert cloud.resources == {}


def test_another_zone_is_tried_at_once_and_the_old_one_left_clean(cloud):
    report_in(cloud.plays(lives=[{"states": [FAILED]}, {}]))
    one = driver.drive(cloud.launch(zones=("us-east5-b", "europe-west4-a")), cloud.world)
    assert (one.state.outcome, one.zone) == ("done", "europe-west4-a")
    [(first, second)] = [cloud.calls("queued-resources create")]
    assert ("--zone=us-east5-b" in first, "--zone=europe-west4-a" in second) == (True, True)
    assert "--zone=us-east5-b" in cloud.calls("queued-resources delete")[0]


def test_no_capacity_within_the_hours_is_told_and_deleted(cloud):
    cloud.plays(lives=[{"states": ["WAITING_FOR_RESOURCES"]}], undeletable=[])
    one = driver.drive(cloud.launch(hours=1.0), cloud.world)
    assert one.state.outcome == "failed"
    assert "no capacity within 1 hours (state WAITING_FOR_RESOURCES)" in one.state.message
    assert cloud.resources == {}


def test_slices_that_the_service_takes_are_deleted_and_asked_for_again(cloud):
    report_in(cloud.plays(lives=[{"looks": ["running 0", "lost"]}, {"looks": ["lost"]}, {}]))
    one = driver.drive(cloud.launch(), cloud.world)
    assert (one.state.outcome, one.state.preemptions) == ("done", 2)
    assert (len(cloud.calls("create")), len(cloud.calls("queued-resources delete"))) == (3, 3)
    assert cloud.resources == {}


def test_what_a_user_deletes_is_not_made_again(cloud):
    gone = {"state": "SUSPENDED", "stateInitiator": "USER"}
    cloud.plays(lives=[{"states": ["ACTIVE", "ACTIVE", gone], "looks": ["running 0"]}])
    one = driver.drive(cloud.launch(), cloud.world)
    assert (one.state.outcome, len(cloud.calls("create")), cloud.resources) == ("failed", 1, {})
    assert "somebody suspended or deleted" in one.state.message


def test_a_program_that_saved_after_a_signal_is_started_again_on_the_same_slices(cloud):
    report_in(cloud.plays(lives=[{"looks": ["running 0", "ended 75", "running 0", "ended 0"]}]))
    one = driver.drive(cloud.launch(), cloud.world)
    assert (one.state.outcome, one.state.restarts, one.state.preemptions) == ("done", 1, 0)
    assert (len(cloud.calls("create")), len(cloud.calls("host.sh start"))) == (1, 2)


def test_a_host_that_died_takes_the_others_along_and_all_start_again(cloud):
    died = ["ended 134", "ended 134", "ended 137", "ended 1"]  # the killed one, and what the others made of it
    report_in(cloud.plays(lives=[{"looks": [died, "running 0", "ended 0"]}]))
    one = driver.drive(cloud.launch(), cloud.world)
    assert (one.state.outcome, one.state.crashes) == ("done", 1)


def test_a_program_that_fails_by_itself_is_not_started_again(cloud):
    cloud.plays(lives=[{"looks": [["ended 134", "ended 1", "ended 134", "ended 134"]]}])
    one = driver.drive(cloud.launch(), cloud.world)
    assert one.state.outcome == "failed"
    assert one.state.message == "the program ended with code 1 on first-w-1: its log says why"
    assert (len(cloud.calls("host.sh start")), cloud.resources) == (1, {})


def test_a_program_that_dies_over_and_over_is_given_up(cloud):
    cloud.plays(lives=[{"looks": ["ended 137"]}])
    one = driver.drive(cloud.launch(), cloud.world)
    assert (one.state.outcome, len(cloud.calls("host.sh start")), cloud.resources) == ("failed", 4, {})


def test_a_host_that_does_not_answer_at_first_is_tried_again(cloud):
    refused = "ERROR: (gcloud.compute.tpus.queued-resources.ssh) worker 2: ssh exited with return code [255]."
    failures = [{"verb": verb, "worker": 2, "times": 2, "stderr": refused} for verb in ("scp", "bootstrap", "start")]
    report_in(cloud.plays(ssh=failures))
    one = driver.drive(cloud.launch(), cloud.world)
    assert (one.state.outcome, len(cloud.calls("create"))) == ("done", 1)
    assert len(cloud.calls("host.sh bootstrap")) >= 3


@pytest.mark.parametrize("said", [{"stderr": "UNAVAILABLE: 503"}, {"stdout": "Updates are available!"}])
def test_an_api_that_does_not_answer_properly_is_asked_again(cloud, said):
    report_in(cloud.plays(ssh=[{"verb": "describe", "times": 3, **said}]))
    one = driver.drive(cloud.launch(), cloud.world)
    assert (one.state.outcome, len(cloud.calls("create")), cloud.resources) == ("done", 1, {})


def test_a_host_that_refuses_is_explained(cloud):
    refused = "posttrain-refused: first-w-0: uv cannot be installed"
    cloud.plays(ssh=[{"verb": "bootstrap", "stderr": refused}])
    one = driver.drive(cloud.launch(), cloud.world)
    assert one.state.message.startswith("a host cannot run this: first-w-0: uv cannot be installed")
    assert (one.state.outcome, cloud.resources) == ("failed", {})


def test_a_deletion_refused_while_provisioning_is_tried_until_it_is_done(cloud):
    cloud.plays(lives=[{"states": ["PROVISIONING", "PROVISIONING", "PROVISIONING", "ACTIVE"]}])
    world = cloud.world_with("interrupt", after=Action.WATCH)
    one = driver.drive(cloud.launch(), world)
    assert (one.state.outcome, cloud.resources) == ("stopped", {})
    assert len(cloud.calls("queued-resources delete")) > 1


def test_a_resource_of_that_name_that_is_not_ours_is_left_alone(cloud):
    cloud.plays()
    other = driver.drive(cloud.launch(), cloud.world_with("interrupt", after=Action.FOLLOW))
    assert (other.state.exists, list(cloud.resources)) == (True, ["first"])
    mine = driver.drive(cloud.launch(), cloud.world)  # another id
    assert mine.state.outcome == "failed"
    assert "not of this launch" in mine.state.message
    assert list(cloud.resources) == ["first"]


ACTIONS = [action for action in Action if action not in (Action.QUIT, Action.HALT)]


@pytest.mark.parametrize("at", ACTIONS)
@pytest.mark.parametrize("word", ["interrupt", "leave"])
def test_after_ctrl_c_in_any_state_nothing_unknown_is_left(cloud, at, word):
    report_in(cloud.plays(lives=[{"looks": ["lost"]}, {"looks": ["running 0", "ended 75", "ended 0"]}]))
    one = driver.drive(cloud.launch(), cloud.world_with(word, after=at))
    assert record.load("first") == one
    assert one.state.exists == bool(cloud.resources)
    if at in (Action.CREATE, Action.WATCH, Action.BOOTSTRAP) and word == "interrupt":
        assert (one.state.outcome, cloud.resources) == ("stopped", {})  # it had not begun: deleted again
    after = driver.drive(driver.taken_up(record.load("first")), cloud.world)  # attach
    assert after.state.outcome == ("stopped" if one.state.outcome == "stopped" else "done")
    assert (after.state.exists, cloud.resources) == (False, {})


@pytest.mark.parametrize("at", ACTIONS)
def test_stop_ends_a_launch_that_was_left_in_any_state(cloud, at):
    report_in(cloud.plays(lives=[{"looks": ["lost"]}, {"looks": ["running 0", "ended 75", "ended 0"]}]))
    driver.drive(cloud.launch(), cloud.world_with("leave", after=at))
    after = driver.drive(driver.told_to_end(record.load("first")), cloud.world)
    assert after.state.outcome in ("stopped", "done")
    assert (after.state.exists, cloud.resources) == (False, {})


def test_a_running_program_is_told_to_save_before_its_slices_are_deleted(cloud):
    report_in(cloud.plays(lives=[{"looks": ["running 0"]}]))
    driver.drive(cloud.launch(), cloud.world_with("interrupt", after=Action.FOLLOW))
    driver.drive(driver.told_to_end(record.load("first")), cloud.world)
    calls = [" ".join(call) for call in cloud.calls()]
    [saved] = [i for i, call in enumerate(calls) if "host.sh stop" in call]
    [deleted] = [i for i, call in enumerate(calls) if "queued-resources delete" in call]
    assert saved < deleted


def test_a_hanging_login_is_cut_off_by_ctrl_c(cloud):
    cloud.plays(ssh=[{"verb": "bootstrap", "hang": 60}])
    world = cloud.world
    threading.Timer(1.5, world.wish.interrupt).start()
    one = driver.drive(cloud.launch(), world)
    assert (one.state.outcome, cloud.resources) == ("stopped", {})
