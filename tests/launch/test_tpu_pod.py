"""TPU slices, without a cloud: dry runs, a fake gcloud, and a worker here."""

import os
import shlex
import signal
import subprocess

import pytest
from scripts import (
  FLAGS,
  ROOT,
  bash,
  calls,
  fake,
  on_path,
  wait_for,
)

POD = ("launch/tpu_pod.sh", "--name=pod", "--zone=us-x1-a", "--project=p")
NEW = ("--type=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite")


def dry(*words: str) -> list[list[str]]:
  """The commands of a dry run, as a shell reads them back."""
  lines = bash(*POD, "--dry-run", "--poll=0", *words).stdout.splitlines()
  return [shlex.split(line) for line in lines]


def over_there(command: list[str]) -> list[str]:
  """What a shell on the host reads in an ssh command of ours."""
  assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
  (line,) = (
    w.removeprefix("--command=") for w in command if w.startswith("--command=")
  )
  return shlex.split(line)


WORKER = ["bash", "elit_jax/launch/tpu_worker.sh"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def test_create_asks_for_a_slice_and_waits_for_it():
  create, describe = dry(*NEW, "--spot", "create")
  assert create[:6] == [*QUEUED, "create", "pod"]
  wanted = {
    *("--zone=us-x1-a", "--project=p", "--node-id=pod", "--spot"),
    *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
  }
  assert set(create[6:]) == wanted
  assert describe[:6] == [*QUEUED, "describe", "pod"]
  assert "--spot" not in dry(*NEW, "create")[0]


@pytest.mark.parametrize(
  ("share", "kind"),
  [("--filestore=10.0.0.2:/share", "filestore"), ("--bucket=data", "bucket")],
)
def test_setup_brings_the_commit_python_and_the_share(share, kind):
  archive, copy, install, mount = dry(share, "setup")
  assert archive[:2] == ["git", "-C"]
  assert archive[-1] == "HEAD"
  assert copy[3:6] == ["tpu-vm", "scp", archive[-2].removeprefix("--output=")]
  assert "--worker=all" in copy
  assert over_there(install)[-3:] == [*WORKER, "install"]
  assert over_there(mount) == [*WORKER, "mount", kind, share.partition("=")[2]]
  assert len(dry("setup")) == 3


def test_run_hands_the_flags_over_word_by_word():
  (start,) = dry("run", "--", *FLAGS)
  assert "--worker=all" in start
  assert over_there(start) == [*WORKER, "start", *FLAGS]


def test_run_on_spot_stays_and_looks():
  start, describe, status = dry(*NEW, "--spot", "run", "--", *FLAGS)
  assert over_there(start)[2] == "start"
  assert describe[4] == "describe"
  assert over_there(status) == [*WORKER, "status"]


def test_logs_and_stop():
  ((logs,), (stop,)) = dry("logs"), dry("stop")
  assert "--worker=0" in logs
  assert over_there(logs) == [*WORKER, "log", "follow"]
  assert over_there(stop)[-3:] == [*WORKER, "stop"]
  assert "--worker=3" in dry("logs", "3")[0]
  assert "--worker=all" in dry("logs", "all")[0]
  assert dry("stop", "--delete")[1][:6] == [*QUEUED, "delete", "pod"]


def test_a_dry_run_runs_nothing(tmp_path):
  fake(tmp_path, "gcloud", "")
  fake(tmp_path, "git", "")
  run = ["run", "--", *FLAGS]
  for command in (["create"], ["setup"], run, ["logs"], ["stop", "--delete"]):
    bash(*POD, *NEW, "--spot", "--dry-run", *command, env=on_path(tmp_path))
  assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
  "words",
  [
    ("--name=a", "--zone=b"),
    ("--name=a", "run", "--"),
    (*POD[1:], "start"),
    (*POD[1:], "create"),
    (*POD[1:], "run", "--config=x"),
    (*POD[1:], "--preemptible", "create"),
    (*POD[1:], "--poll=soon", "logs"),
    (*POD[1:], "--bucket=a", "--filestore=b", "setup"),
    (*POD[1:], "--dry-run", "stop", "now"),
    (*POD[1:], "stop", "--delte"),
    (*POD[1:], "stop", "--delete", "now"),
    (*POD[1:], "--spot", "run", "--", *FLAGS),
    (*POD[1:], "run", "--"),
    (*POD[1:], *NEW, "create", "now"),
    (*POD[1:], "setup", "--bucket=a"),
    (*POD[1:], "logs", "first"),
    (*POD[1:], "logs", "0", "1"),
    (*POD[1:], "--env=1=2", "run", "--", *FLAGS),
  ],
)
def test_what_tpu_pod_does_not_understand_is_refused_before_it_acts(words, tmp_path):
  fake(tmp_path, "gcloud", "")
  fake(tmp_path, "git", "")
  done = bash(POD[0], *words, env=on_path(tmp_path), code=2)
  assert done.stderr.startswith("error: ")
  assert not (tmp_path / "calls").exists()


def test_settings_reach_the_hosts():
  (start,) = dry("--env=ELIT_TPU_FLAGS=overlap", "--env=A=b c", "run", "--", *FLAGS)
  settings = ["env", "ELIT_TPU_FLAGS=overlap", "A=b c"]
  assert over_there(start) == [*settings, *WORKER, "start", *FLAGS]


def test_setup_says_what_it_leaves_behind(tmp_path):
  fake(tmp_path, "gcloud", "")
  fake(tmp_path, "git", "[[ $* != *status* ]] || echo ' M main.py'")
  assert "not committed" in bash(*POD, "setup", env=on_path(tmp_path)).stderr
  fake(tmp_path, "git", "")
  assert bash(*POD, "setup", env=on_path(tmp_path)).stderr == ""


# Says line by line what the files `states` and `runs` hold, and fails once for each
# line of `failing`, at the first command that holds it.
GCLOUD = """
text=
[[ ! -s $FAKES/failing ]] || read -r text <"$FAKES/failing"
if [[ -n $text && "$*" == *"$text"* ]]; then
  sed -i 1d "$FAKES/failing"
  exit 1
fi
case "$*" in
  *describe*) list=states ;;
  *tpu_worker.sh\\ status*) list=runs ;;
  *) exit 0 ;;
esac
line=$(head -n 1 "$FAKES/$list")
sed -i 1d "$FAKES/$list"
if [[ $line == gone ]]; then
  echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2
  exit 1
fi
tr '|' '\\n' <<<"$line"
"""


def cloud(
  folder,
  states: tuple[str, ...] = (),
  runs: tuple[str, ...] = (),
  failing: tuple[str, ...] = (),
) -> dict[str, str]:
  """A slice that is in these states, and whose hosts say so; the environment."""
  fake(folder, "gcloud", GCLOUD)
  fake(folder, "git", "")
  for name, lines in {"states": states, "runs": runs, "failing": failing}.items():
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
  return {**on_path(folder), "FAKES": str(folder)}


def done_to(folder) -> list[str]:
  """What has been done to a slice and on its hosts."""
  words = {
    "queued-resources create": "create",
    "queued-resources delete": "delete",
    "install": "install",
    "tpu_worker.sh start": "start",
    "tpu_worker.sh resume": "resume",
  }
  done = calls(folder, "gcloud")
  return [name for line in done for text, name in words.items() if text in line]


SPOT = (*POD, *NEW, "--spot", "--poll=0")
RUN = ("run", "--", *FLAGS)


def spot_run(folder, *args, code: int = 0) -> list[str]:
  """`run` in such a cloud; what it did."""
  bash(*SPOT, *RUN, env=cloud(folder, *args), code=code, timeout=30)
  return done_to(folder)


TAKEN_AWAY = ("ACTIVE", "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE")
MADE_ANEW = ["start", "delete", "create", "install", "resume"]


@pytest.mark.parametrize("failing", [(), ("delete",)])
def test_a_slice_that_is_taken_away_is_made_anew_and_goes_on(tmp_path, failing):
  """Also where it can no longer be deleted: it may be gone already."""
  runs = ("elit: running", "elit: exit 0")
  did = spot_run(tmp_path, (*TAKEN_AWAY, "ACTIVE"), runs, failing)
  assert did == MADE_ANEW
  first, second = (c for c in calls(tmp_path, "gcloud") if "--workdir" in c)
  assert second == first.replace(" start ", " resume ")


@pytest.mark.parametrize(
  ("failing", "did"),
  [
    ("install", [*MADE_ANEW[:4], "install", "resume"]),
    ("resume", [*MADE_ANEW, "resume"]),
  ],
)
def test_what_fails_on_a_new_slice_is_tried_again(tmp_path, failing, did):
  runs = ("elit: running", "elit: exit 0")
  states = (*TAKEN_AWAY, "ACTIVE", "ACTIVE")
  assert spot_run(tmp_path, states, runs, (failing,)) == did


def test_a_slice_that_could_not_be_asked_for_is_asked_for_again(tmp_path):
  states = ("SUSPENDED", "gone", "PROVISIONING", "ACTIVE", "ACTIVE")
  did = spot_run(tmp_path, states, ("elit: exit 0",), ("resources create",))
  assert did == ["start", "delete", "create", "create", "install", "resume"]


@pytest.mark.parametrize("code", [75, 134, 143])
def test_a_run_that_lost_a_peer_or_saved_is_started_again(tmp_path, code):
  runs = (f"elit: exit {code}", "elit: exit 0")
  assert spot_run(tmp_path, ("ACTIVE",) * 2, runs) == ["start", "resume"]


def test_a_host_that_has_lost_its_run_makes_it_start_again(tmp_path):
  runs = ("elit: none|elit: none", "elit: exit 0|elit: exit 0")
  assert spot_run(tmp_path, ("ACTIVE",) * 2, runs) == ["start", "resume"]


@pytest.mark.parametrize(
  ("said", "code"),
  [
    ("elit: exit 2", 2),
    ("elit: exit 134|elit: exit 1", 1),
    ("elit: exit 1|elit: exit 75", 1),
    ("elit: exit 134|elit: exit 137", 137),
  ],
)
def test_an_error_is_not_tried_again_and_is_the_exit_code(tmp_path, said, code):
  assert spot_run(tmp_path, ("ACTIVE",), (said,), code=code) == ["start"]


@pytest.mark.parametrize(
  "said", ["stopped 75|elit: running", "stopped 75|elit: exit 75"]
)
def test_a_stop_ends_the_watching_once_none_runs(tmp_path, said):
  runs = (f"elit: {said}", "elit: stopped 75|elit: stopped 0")
  assert spot_run(tmp_path, ("ACTIVE",) * 2, runs, code=75) == ["start"]


@pytest.mark.parametrize("state", ["DELETING", "gone"])
def test_a_slice_that_another_deletes_is_not_made_anew(tmp_path, state):
  states = (*TAKEN_AWAY[:4], state)
  did = spot_run(tmp_path, states, ("elit: running",), code=75)
  assert did == ["start", "delete", "create"]


@pytest.mark.parametrize("restarts", [0, 2])
def test_it_gives_up_after_so_many_restarts(tmp_path, restarts):
  env = cloud(tmp_path, ("ACTIVE",) * 9, ("elit: exit 134",) * 9)
  done = bash(*SPOT, f"--restarts={restarts}", *RUN, env=env, code=1)
  assert done_to(tmp_path) == ["start", *["resume"] * restarts]
  assert f"gave up after {restarts} restarts (exit 134)" in done.stderr
  assert "stop --delete" in done.stderr  # it still costs money


@pytest.mark.parametrize(
  ("between", "made"),
  [
    (("SUSPENDING", "SUSPENDED"), ["delete", "create"]),
    (("WAITING_FOR_RESOURCES", "PROVISIONING"), []),
  ],
)
def test_a_watch_can_be_taken_up_again(tmp_path, between, made):
  """Also where the slice has been taken away in the meantime."""
  states = (*between, "ACTIVE", "ACTIVE")
  did = spot_run(tmp_path, states, ("elit: exit 0",), ("worker.sh start",))
  assert did == ["start", *made, "install", "resume"]


@pytest.mark.parametrize("state", ["ACTIVE", "gone"])
def test_a_run_that_cannot_start_is_an_error(tmp_path, state):
  did = spot_run(tmp_path, (state,), (), ("worker.sh start",), code=1)
  assert did == ["start"]


@pytest.mark.parametrize(
  ("state", "code", "did"),
  [("ACTIVE", 1, []), ("gone", 1, []), ("SUSPENDED", 0, ["delete"])],
)
def test_what_could_not_be_stopped_is_deleted_only_if_nothing_runs(
  tmp_path, state, code, did
):
  env = cloud(tmp_path, (state,), failing=("worker.sh stop",))
  bash(*POD, "stop", "--delete", env=env, code=code)
  assert done_to(tmp_path) == did


def test_waiting_for_a_slice_ends_where_it_is_deleted(tmp_path):
  env = cloud(tmp_path, ("WAITING_FOR_RESOURCES", "DELETING"))
  done = bash(*POD, *NEW, "--poll=0", "create", env=env, code=1)
  assert "deleted" in done.stderr


SLEEPS = """
[[ $1 == main.py ]] || exit 0
trap 'kill $!; exit ${LEAVES:-${ELIT_REQUEUE_CODE:-0}}' TERM
sleep 60 &
echo up >>"$ELIT_STATE/up"
wait
"""
# The one host is this machine: what it is told to do is done, by tpu_worker.sh itself.
HOST = """
for word in "$@"; do
  if [[ $word == --command=* ]]; then
    cd "$FAKES/home"
    exec bash -c "${word#--command=}"
  fi
done
sleep 0.1
echo ACTIVE
"""


def test_a_preemption_is_no_success_and_a_stop_is_the_end(tmp_path):
  """The watched run leaves on a SIGTERM that nobody has asked for, then on a stop."""
  fake(tmp_path, "gcloud", HOST)
  fake(tmp_path, "python", SLEEPS)
  (tmp_path / "home").mkdir()
  (tmp_path / "home/elit_jax").symlink_to(ROOT)
  state = tmp_path / "state"
  env = {**on_path(tmp_path), "FAKES": str(tmp_path), "ELIT_STATE": str(state)}
  env |= {"PYTHON": str(tmp_path / "python")}

  def times_up() -> int:
    return len((state / "up").read_text().split()) if (state / "up").exists() else 0

  watch = subprocess.Popen(["bash", *SPOT, *RUN], cwd=ROOT, env={**os.environ, **env})
  try:
    wait_for(lambda: times_up() == 1)
    os.kill(int((state / "pid").read_text()), signal.SIGTERM)
    wait_for(lambda: times_up() == 2)
    assert watch.poll() is None
    assert "elit: stopped 75" in bash(*POD, "stop", env=env).stdout
    assert watch.wait(30) == 75
  finally:
    watch.kill()
    bash("launch/tpu_worker.sh", "stop", env=env)
  assert done_to(tmp_path) == ["start", "resume"] and times_up() == 2
  assert len([call for call in calls(tmp_path, "python") if FLAGS[0] in call]) == 2


@pytest.fixture
def worker(tmp_path):
  """tpu_worker.sh with a python that sleeps until SIGTERM, and its own state."""
  fake(tmp_path, "python", SLEEPS)
  state = {"PYTHON": str(tmp_path / "python"), "ELIT_STATE": str(tmp_path / "state")}

  def run(*words: str, **kwargs) -> str:
    env = {**state, "LIBTPU_INIT_ARGS": "", **kwargs.pop("env", {})}
    return bash("launch/tpu_worker.sh", *words, env=env, **kwargs).stdout.strip()

  yield run
  run("stop")


def test_a_worker_runs_in_the_background_and_stops_on_request(worker, tmp_path):
  assert worker("status") == "elit: none"
  worker("start", *FLAGS, env={"LEAVES": "9"})
  assert worker("status") == "elit: running"
  worker("start", "--config=other", code=2)  # one at a time
  assert worker("start", *FLAGS) == "elit: running"  # asked twice
  wait_for((tmp_path / "state/up").exists)
  assert calls(tmp_path, "python") == [f"python main.py {' '.join(FLAGS)}"]
  assert worker("stop") == worker("status") == "elit: stopped 9"
  worker("start", *FLAGS)
  assert worker("status") == "elit: running"


def test_what_is_stopped_is_started_by_request_alone(worker, tmp_path):
  """A watcher may have looked just before the stop."""
  worker("start", *FLAGS)
  wait_for((tmp_path / "state/up").exists)
  os.kill(int((tmp_path / "state/pid").read_text()), signal.SIGTERM)
  wait_for((tmp_path / "state/exit").exists)
  assert worker("status") == "elit: exit 75"
  assert worker("stop") == worker("resume", *FLAGS) == "elit: stopped 75"
  assert len(calls(tmp_path, "python")) == 1
  assert worker("start", *FLAGS) == "elit: started"
  wait_for(lambda: len((tmp_path / "state/up").read_text().split()) == 2)
  os.kill(int((tmp_path / "state/pid").read_text()), signal.SIGTERM)
  wait_for((tmp_path / "state/exit").exists)
  assert worker("status") == "elit: exit 75"  # that stop was of the run before


def test_a_worker_that_does_not_leave_is_said_to_run(worker, tmp_path):
  fake(tmp_path, "python", SLEEPS.replace("kill $!; exit", "sleep 2; kill $!; exit"))
  worker("start", *FLAGS)
  wait_for((tmp_path / "state/up").exists)
  worker("stop", env={"ELIT_STOP_SECONDS": "0"}, code=2)
  assert worker("status") == "elit: running"
  assert worker("stop") == "elit: stopped 75"


def test_what_fails_before_python_is_an_exit_too(worker, tmp_path):
  worker("start", *FLAGS, env={"ELIT_TPU_FLAGS": "fast"})
  wait_for((tmp_path / "state/exit").exists)
  assert worker("status") == "elit: exit 1"
  assert '"fast"' in worker("log")


def test_a_number_that_another_program_has_now_is_no_run(worker, tmp_path):
  (tmp_path / "state").mkdir()
  with subprocess.Popen(["sleep", "60"]) as other:
    (tmp_path / "state/pid").write_text(f"{other.pid}\n")
    try:
      assert worker("status") == "elit: none"
      worker("stop")
      assert other.poll() is None
    finally:
      other.kill()
