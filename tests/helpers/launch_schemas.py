"""JSON schemas of the launch files: what their documentation allows of the fields that are used, and nothing else.

JobSet: kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go. Job and pod: the Kubernetes API reference, batch/v1
Job and core/v1 PodSpec. Google's labels and the driver: the GKE pages on TPU node pools and on Cloud Storage FUSE.
SkyPilot: docs/source/reference/yaml-spec.rst, and the schema in sky/utils/schemas.py for job_recovery.
"""


def _object(required: list[str], **properties) -> dict:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _list(of: dict, least: int = 1) -> dict:
    return {"type": "array", "items": of, "minItems": least}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 40}
EXIT_CODES = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 255}, "minItems": 1}
TPUS = _object(["google.com/tpu"], **{"google.com/tpu": COUNT})

_POD = _object(
    ["containers", "restartPolicy", "nodeSelector"],
    restartPolicy={"const": "Never"},  # a pod failure policy needs it
    serviceAccountName=TEXT,
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=_object(
        ["cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"],
        **{
            "cloud.google.com/gke-tpu-accelerator": {"type": "string", "pattern": "^tpu[-0-9a-z]+$"},
            "cloud.google.com/gke-tpu-topology": {"type": "string", "pattern": r"^\d+x\d+(x\d+)?$"},
            "cloud.google.com/gke-spot": {"const": "true"},
        },
    ),
    containers=_list(
        _object(
            ["name", "image", "command", "args", "resources"],
            name=NAME,
            image=TEXT,
            command=_list(TEXT),
            args=_list({"type": "string"}),
            ports=_list(_object(["containerPort"], containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
            resources=_object(["requests", "limits"], requests=TPUS, limits=TPUS),
            volumeMounts=_list(
                _object(["name", "mountPath"], name=NAME, mountPath={"type": "string", "pattern": "^/"})
            ),
        )
    ),
    volumes=_list(
        _object(
            ["name", "csi"],
            name=NAME,
            csi=_object(
                ["driver"],
                driver={"const": "gcsfuse.csi.storage.gke.io"},
                readOnly={"type": "boolean"},
                volumeAttributes={"type": "object", "additionalProperties": TEXT},
            ),
        )
    ),
)

_JOB = _object(
    ["parallelism", "completions", "backoffLimit", "template"],
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit={"type": "integer", "minimum": 0},
    podFailurePolicy=_object(
        ["rules"],
        rules=_list(
            {
                "oneOf": [
                    _object(
                        ["action", "onExitCodes"],
                        action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
                        onExitCodes=_object(
                            ["operator", "values"],
                            containerName=NAME,
                            operator={"enum": ["In", "NotIn"]},
                            values=EXIT_CODES,
                        ),
                    ),
                    _object(
                        ["action", "onPodConditions"],
                        action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
                        onPodConditions=_list(
                            _object(["type", "status"], type=TEXT, status={"enum": ["True", "False", "Unknown"]})
                        ),
                    ),
                ]
            }
        ),
    ),
    template=_object(
        ["spec"],
        spec=_POD,
        metadata=_object(["annotations"], annotations=_object([], **{"gke-gcsfuse/volumes": {"const": "true"}})),
    ),
)

JOBSET = _object(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=_object(["name"], name=NAME, annotations={"type": "object", "additionalProperties": TEXT}),
    spec=_object(
        ["replicatedJobs"],
        failurePolicy=_object(
            [],
            maxRestarts={"type": "integer", "minimum": 0},
            rules=_list(
                _object(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    targetReplicatedJobs=_list(NAME),
                    onJobFailureReasons=_list(
                        {
                            "enum": [
                                "BackoffLimitExceeded",
                                "DeadlineExceeded",
                                "FailedIndexes",
                                "MaxFailedIndexesExceeded",
                                "PodFailurePolicy",
                            ]
                        }
                    ),
                )
            ),
        ),
        replicatedJobs=_list(
            _object(["name", "replicas", "template"], name=NAME, replicas=COUNT, template=_object(["spec"], spec=_JOB))
        ),
    ),
)

SKYPILOT = _object(
    ["run"],
    name={"type": "string", "pattern": "^[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?$"},
    workdir=TEXT,
    num_nodes=COUNT,
    resources=_object(
        [],
        infra=TEXT,
        accelerators={"type": "string", "pattern": r"^[-A-Za-z0-9]+(:\d+)?$"},
        use_spot={"type": "boolean"},
        disk_size=COUNT,
        job_recovery=_object(
            [],
            strategy={"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
            max_restarts_on_errors={"type": "integer", "minimum": 0},
            recover_on_exit_codes=EXIT_CODES,
        ),
    ),
    envs={"type": "object", "additionalProperties": {"type": "string"}},
    file_mounts={
        "type": "object",
        "additionalProperties": _object(
            ["source"],
            source={"type": "string", "pattern": "^(gs|s3|r2|https)://"},
            mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]},
        ),
    },
    setup=TEXT,
    run=TEXT,
)
