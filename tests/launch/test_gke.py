"""Manifests for GKE, and xpk, without a cluster."""

import re
import shlex

import pytest
import yaml
from scripts import FLAGS, LAUNCH, ROOT, bash

MANIFESTS = sorted(LAUNCH.glob("gke/*.yaml"))


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def jobset(request) -> dict:
  manifest = yaml.safe_load(request.param.read_text())
  assert (manifest["apiVersion"], manifest["kind"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
  )
  return manifest


def job_of(jobset: dict) -> dict:
  (replicated,) = jobset["spec"]["replicatedJobs"]
  assert replicated["replicas"] == 1
  return replicated["template"]["spec"]


def container_of(jobset: dict) -> dict:
  (container,) = job_of(jobset)["template"]["spec"]["containers"]
  return container


def env_of(jobset: dict) -> dict:
  return {
    e["name"]: e.get("value", e.get("valueFrom")) for e in container_of(jobset)["env"]
  }


def test_there_is_a_manifest_for_tpus_and_one_for_gpus():
  assert [path.stem for path in MANIFESTS] == ["jobset_gpu", "jobset_tpu"]


def test_all_pods_start_together_and_none_is_restarted_alone(jobset):
  job = job_of(jobset)
  assert job["completionMode"] == "Indexed"
  assert job["completions"] == job["parallelism"] > 1
  assert job["backoffLimit"] == 0
  assert job["template"]["spec"]["restartPolicy"] == "Never"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_wrong_input_ends_the_jobset(jobset):
  (rule,) = job_of(jobset)["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
  (rule,) = jobset["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_pod_has_time_to_save_and_asks_to_be_started_again(jobset):
  assert job_of(jobset)["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
  assert env_of(jobset)["ELIT_REQUEUE_CODE"] == "75"


def test_a_pod_runs_main_on_a_shared_workdir(jobset):
  container = container_of(jobset)
  assert container["command"] == ["python", "main.py"]
  flags = dict(arg.removeprefix("--").split("=", 1) for arg in container["args"])
  assert flags["mode"] == "train"
  assert (ROOT / flags["config"].partition(":")[0]).is_file()
  mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
  (name,) = (n for path, n in mounts.items() if flags["workdir"].startswith(f"{path}/"))
  volumes = {v["name"]: v for v in job_of(jobset)["template"]["spec"]["volumes"]}
  assert "persistentVolumeClaim" in volumes[name]


def test_the_names_in_the_environment_are_those_that_are_read(jobset):
  source = (ROOT / "elit_jax/distributed.py").read_text()
  assert all(f'"{name}"' in source for name in env_of(jobset))


def test_gpu_pods_find_each_other():
  jobset = yaml.safe_load((LAUNCH / "gke/jobset_gpu.yaml").read_text())
  env, name = env_of(jobset), jobset["metadata"]["name"]
  (replicated,) = jobset["spec"]["replicatedJobs"]
  first = f"{name}-{replicated['name']}-0-0.{name}"
  assert re.fullmatch(rf"{re.escape(first)}:\d+", env["ELIT_COORDINATOR"])
  assert env["ELIT_PROCESS_COUNT"] == str(job_of(jobset)["completions"])
  assert "job-completion-index" in env["ELIT_PROCESS_INDEX"]["fieldRef"]["fieldPath"]
  assert container_of(jobset)["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_gpu_pods_may_write_to_a_new_share():
  """Its top belongs to root, and the image has a user of its own."""
  jobset = yaml.safe_load((LAUNCH / "gke/jobset_gpu.yaml").read_text())
  assert re.search(r"^USER (?!root)", (LAUNCH / "Containerfile.cuda").read_text(), re.M)
  assert job_of(jobset)["template"]["spec"]["securityContext"] == {"runAsUser": 0}


def test_tpu_pods_cover_the_slice():
  jobset = yaml.safe_load((LAUNCH / "gke/jobset_tpu.yaml").read_text())
  job = job_of(jobset)
  topology = job["template"]["spec"]["nodeSelector"][
    "cloud.google.com/gke-tpu-topology"
  ]
  chips = container_of(jobset)["resources"]["limits"]["google.com/tpu"]
  x, y = map(int, topology.split("x"))
  assert x * y == chips * job["completions"]
  assert "ELIT_COORDINATOR" not in env_of(jobset)  # GKE tells jax


XPK = ("launch/gke/xpk.sh", "--cluster=c", "--workload=w", "--image=i", "--dry-run")


def test_xpk_is_given_the_same_contract():
  command = shlex.split(bash(*XPK, "--slices=2", "--", *FLAGS).stdout)
  assert command[:3] == ["xpk", "workload", "create"]
  assert {"--cluster=c", "--workload=w", "--docker-image=i"} <= set(command)
  assert "--num-slices=2" in command
  assert "--restart-on-exit-codes=75,134" in command
  assert command[command.index("--env") + 1] == "ELIT_REQUEUE_CODE=75"
  (line,) = (
    w.removeprefix("--command=") for w in command if w.startswith("--command=")
  )
  assert shlex.split(line) == ["exec", "python", "main.py", *FLAGS]


def test_xpk_is_told_where_the_cluster_is_if_it_must_be():
  command = shlex.split(bash(*XPK, "--project=p", "--zone=z", "--", "a").stdout)
  assert {"--project=p", "--zone=z"} <= set(command)
  assert not any("--zone" in w for w in shlex.split(bash(*XPK, "--", "a").stdout))


@pytest.mark.parametrize("words", [XPK[1:], (*XPK[1:3], "--", "a"), ("--nodes=2",)])
def test_what_xpk_does_not_understand_is_refused(words):
  assert bash(XPK[0], *words, code=2).stderr.startswith("error: ")
