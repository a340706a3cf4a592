"""Plays gcloud on the PATH of tests: `python -I -S fake_gcloud.py WORDS`, with its cloud in the folder $FAKE_CLOUD.

scenario.json says what happens, cloud.json what exists, calls.jsonl what was called. A scenario has `lives`, one for a
creation: `refused` is the error message of a creation, `states` are what one `describe` after the other shows (the last
one stays), `looks` what one look at the first host after the other finds: 'running 0', 'ended 75', a list with one of
those for each host, or 'lost', when the service takes the slices away. `ssh` are failures of the next calls of a verb
(or of describe).
With `real`, hosts are folders of this machine, and what is sent to them runs there; the service takes them away when a
file `taken` appears in the cloud's folder.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time

CLOUD = os.environ["FAKE_CLOUD"]
ZONE = "us-east5-b"
DEFAULTS = {
    "accounts": ["me@example.com"],
    "enabled": True,
    "types": {ZONE: ["v6e-16"], "europe-west4-a": ["v6e-16"]},
    "quotas": [],
    "bucket": {},
    "lives": [{}],
    "ssh": [],
    "hosts": 4,
    "undeletable": ["PROVISIONING"],
    "real": False,
}


class Failure(Exception):
    """What gcloud says on stderr before it ends with 1."""


def path(name):
    return os.path.join(CLOUD, name)


def load(name, default):
    try:
        with open(path(name)) as file:
            return json.load(file)
    except FileNotFoundError:
        return default


def save(name, content):
    with open(path(name + ".partial"), "w") as file:
        json.dump(content, file)
    os.replace(path(name + ".partial"), path(name))


def option(words, name, default=""):
    for i, word in enumerate(words):
        if word.startswith(name + "="):
            return word.partition("=")[2]
        if word == name:
            return words[i + 1]
    return default


def current(life):
    """The state that a describe shows now, moving on to the next."""
    states = life["states"]
    state = states.pop(0) if len(states) > 1 else states[0]
    return state if isinstance(state, dict) else {"state": state, "stateInitiator": "SERVICE"}


def create(words, cloud, scenario):
    name, lives = words[0], scenario["lives"]
    if name in cloud["resources"]:
        raise Failure(
            f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource '{name}' already exists"
        )
    life = dict(lives[min(cloud["created"], len(lives) - 1)])
    cloud["created"] += 1
    if "refused" in life:
        save("cloud.json", cloud)
        raise Failure(f"ERROR: (gcloud.compute.tpus.queued-resources.create) {life['refused']}")
    life.setdefault("states", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    life.setdefault("looks", ["running 0", "ended 0"])
    labels = {pair.partition("=")[0]: pair.partition("=")[2] for pair in option(words, "--labels").split(",")}
    count = int(option(words, "--node-count", "1"))
    nodes = [name] if count == 1 else [f"{name}-{i}" for i in range(count)]
    cloud["resources"][name] = {**life, "labels": labels, "zone": option(words, "--zone"), "nodes": nodes, "log": ""}


def found(words, cloud):
    name = words[0]
    if name not in cloud["resources"] or cloud["resources"][name]["zone"] != option(words, "--zone"):
        raise Failure(f"ERROR: (gcloud.compute.tpus.queued-resources) NOT_FOUND: Resource '{name}' was not found")
    return cloud["resources"][name]


def describe(words, cloud, scenario):
    life = found(words, cloud)
    failure, _ = refuse_ssh("describe", cloud, scenario, [])
    if failure and "stderr" in failure:
        raise Failure(failure["stderr"])
    if failure:
        return print(failure["stdout"])
    state = current(life)
    life["now"] = state["state"]
    print(json.dumps({
        "name": f"projects/p/locations/{life['zone']}/queuedResources/{words[0]}",
        "state": state,
        "tpu": {"nodeSpec": [{"nodeId": node, "node": {"labels": life["labels"]}} for node in life["nodes"]]},
    }))  # fmt: skip


def delete(words, cloud, scenario):
    life = found(words, cloud)
    state = life.get("now", "ACCEPTED")
    if state in scenario["undeletable"]:
        raise Failure(f"ERROR: INVALID_ARGUMENT: DeleteQueuedResource is not supported when state is {state}")
    for node in life["nodes"]:
        for host in range(scenario["hosts"]):
            end(node, host)
    del cloud["resources"][words[0]]


def end(node, host):
    """A host of this machine is gone, with its processes."""
    folder = host_folder(node, host)
    if os.path.isdir(folder):
        subprocess.run([path_of("kill-host"), folder], check=False)
        shutil.rmtree(folder)


def path_of(tool):
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "fake_host", tool)


def host_folder(node, host):
    return path(f"hosts/{node}-w-{host}")


def nodes(words, cloud, scenario):
    listed = []
    for life in cloud["resources"].values():
        if life["zone"] == option(words, "--zone"):
            ready = life.get("nodes_state", "READY")
            ends = [{"ipAddress": f"10.0.0.{i}"} for i in range(scenario["hosts"])]
            listed += [
                {"name": f"projects/p/locations/z/nodes/{node}", "state": ready, "networkEndpoints": ends}
                for node in life["nodes"]
            ]
    print(json.dumps(listed))


def workers(words, life, scenario):
    """(node, worker) pairs that --node and --worker name."""
    node, worker = option(words, "--node", "0"), option(words, "--worker", "0")
    chosen = life["nodes"] if node == "all" else [life["nodes"][int(node)]]
    return [(one, host) for one in chosen for host in range(scenario["hosts"]) if worker in ("all", str(host))]


def refuse_ssh(verb, cloud, scenario, hosts):
    """A planned failure of this verb, once; the hosts that answer all the same."""
    for failure in scenario["ssh"]:
        if failure["verb"] == verb and failure.get("times", 1) > cloud["failed"].get(verb, 0):
            cloud["failed"][verb] = cloud["failed"].get(verb, 0) + 1
            if "hang" in failure:
                time.sleep(failure["hang"])
            return failure, [one for one in hosts if one[1] != failure.get("worker", one[1])]
    return None, hosts


def ssh(words, cloud, scenario):
    life, command = found(words, cloud), option(words, "--command")
    verb, hosts = command.split()[2], workers(words, life, scenario)
    if life.get("taken"):
        raise Failure("##### Command execution on worker 0 failed with exit status 255. Continuing.")
    failure, answering = refuse_ssh(verb, cloud, scenario, hosts)
    if scenario["real"]:
        code = sum(on_host(node, host, command) for node, host in answering)
    else:
        play(verb, command, life, answering, scenario, alone=len(hosts) == 1)
        code = 0
    if failure or code:
        raise Failure((failure or {}).get("stderr", f"ERROR: a command ended with code {code}"))


def play(verb, command, life, hosts, scenario, *, alone):
    if verb == "bootstrap":
        print("\n".join(f"posttrain-ready {node}-w-{host}" for node, host in hosts))
    if verb == "start":
        life["started"] = life.get("started", 0) + 1
    if verb == "stop":
        life["looks"] = ["ended 75"]
    if verb != "look":
        return
    look = life["looks"][0]
    if alone and len(life["looks"]) > 1:
        look = life["looks"].pop(0)
    life["seen"] = look if alone else life.get("seen", look)
    if life["seen"] == "lost":
        life.update(taken=True, states=[{"state": "SUSPENDED", "stateInitiator": "SERVICE"}])
        raise Failure("ERROR: (gcloud.compute.tpus.queued-resources.ssh) ssh exited with return code [255].")
    if alone:
        life["log"] += f"step {len(life['log'].splitlines())}\n"
        offset = int(command.split()[3])
        print(
            f"posttrain-host {hosts[0][0]}-w-0 {one_of(life['seen'], 0)} {len(life['log'])}\n{life['log'][offset:]}",
            end="",
        )
    else:
        for i, (node, host) in enumerate(hosts):
            print(f"posttrain-host {node}-w-{host} {one_of(life['seen'], i)} {len(life['log'])}")


def one_of(look, i):
    return look if isinstance(look, str) else look[i % len(look)]


def on_host(node, host, command):
    """Run a command in the folder that plays a host."""
    folder = host_folder(node, host)
    os.makedirs(folder, exist_ok=True)
    tools = os.path.dirname(path_of("sudo"))
    environment = {
        **os.environ,
        "HOME": folder,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "FAKE_HOST": f"{node}-w-{host}",
    }
    sys.stdout.flush()
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=False).returncode


def scp(words, cloud, scenario):
    life = found([option_target(words)[0], *words], cloud)
    failure, answering = refuse_ssh("scp", cloud, scenario, workers(words, life, scenario))
    if failure:
        raise Failure(failure["stderr"])
    if not scenario["real"]:
        return
    sources = [word for word in words if not word.startswith("--")]
    target = sources.pop()
    for node, host in answering:
        folder = host_folder(node, host)
        for source in sources:
            remote = source.partition(":")[2]
            if remote:
                shutil.copy(os.path.join(folder, remote), target)
            else:
                place = os.path.join(folder, os.path.basename(source))
                shutil.copytree(source, place, dirs_exist_ok=True)


def option_target(words):
    return [word.partition(":")[0] for word in words if ":" in word and not word.startswith("--")]


def locate(place):
    return path("bucket/" + place.removeprefix("gs://")) if place.startswith("gs://") else place


def storage(words, scenario):
    verb, places = words[0], [word for word in words[1:] if not word.startswith("--")]
    bucket = scenario["bucket"]
    if bucket.get("refused"):
        raise Failure(f"ERROR: (gcloud.storage.{verb}) {bucket['refused']}")
    if verb == "cp" and places[-1].startswith("gs://") and bucket.get("read_only"):
        raise Failure(
            "ERROR: (gcloud.storage.cp) [me@example.com] does not have storage.objects.create access: HTTPError 403"
        )
    if any(not os.path.exists(locate(place)) for place in (places if verb == "cat" else places[:-1])):
        raise Failure(f"ERROR: (gcloud.storage.{verb}) The following URLs matched no objects or files:\n{places[0]}")
    if verb == "cat":
        with open(locate(places[0])) as file:
            print(file.read(), end="")
    elif verb == "cp":
        os.makedirs(os.path.dirname(locate(places[-1])), exist_ok=True)
        for place in places[:-1]:
            shutil.copy(locate(place), locate(places[-1]))


def main(words):
    scenario = {**DEFAULTS, **load("scenario.json", {})}
    cloud = load("cloud.json", {"resources": {}, "created": 0, "failed": {}})
    with open(path("calls.jsonl"), "a") as file:
        file.write(json.dumps(words) + "\n")
    if os.path.exists(path("taken")):
        os.remove(path("taken"))
        for life in cloud["resources"].values():
            life.update(taken=True, states=[{"state": "SUSPENDED", "stateInitiator": "SERVICE"}])
    text = " ".join(word for word in words if word != "alpha")
    verbs = {
        r"compute tpus queued-resources create": create,
        r"compute tpus queued-resources describe": describe,
        r"compute tpus queued-resources delete": delete,
        r"compute tpus queued-resources ssh": ssh,
        r"compute tpus queued-resources scp": scp,
        r"compute tpus tpu-vm list": nodes,
    }
    for pattern, verb in verbs.items():
        if re.match(pattern, text):
            try:
                return verb([word for word in words if word != "alpha"][4:], cloud, scenario)
            finally:
                save("cloud.json", cloud)
    if text.startswith("auth list"):
        print("\n".join(scenario["accounts"]))
    elif text.startswith("services list"):
        print("tpu.googleapis.com" if scenario["enabled"] else "")
    elif text.startswith("compute tpus accelerator-types list"):
        wanted = option(words, "--filter").partition("=")[2]
        print("\n".join(one for one in scenario["types"].get(option(words, "--zone"), []) if one == wanted))
    elif text.startswith("beta quotas info list"):
        print(json.dumps(scenario["quotas"]))
    elif text.startswith("config get-value project"):
        print("my-project")
    elif text.startswith("storage"):
        storage(words[1:], scenario)
    else:
        raise Failure(f"ERROR: (gcloud) Invalid choice: {text}")


if __name__ == "__main__":
    try:
        with open(path("lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # launches side by side share the cloud
            main(sys.argv[1:])
    except Failure as failure:
        sys.stdout.flush()
        print(failure, file=sys.stderr)
        sys.exit(1)
