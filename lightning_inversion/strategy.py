"""``independent_prompts``: processes that share the prompts out, and nothing else.

The prompts are independent, so there is nothing to average and no tensor to exchange. What the
processes have in common is a small store of keys, torch's own: in it they take batches, one after
another, so that a process whose prompts end early takes more. No step waits for another process,
hence none hangs when another one dies. On one machine the store listens on the loopback interface
alone, and its keys begin with a token that only the processes of the run have.
"""

import json
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any, TypeVar

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import (
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    Store,
    TCPStore,
    rendezvous,
)

from lightning_inversion.errors import InputError, ProcessLostError

NAME = "independent_prompts"
ROWS_ARE_WRITTEN = "rows are written"
TOKEN = "LIGHTNING_INVERSION_TOKEN"
"""Environment variable by which the started processes get the run's token."""
_LOOPBACK = "127.0.0.1"
_BEFORE_BATCHES = "run-stage"  # Lightning's name for the barrier before its loop
_T = TypeVar("_T")
_SECONDS_BETWEEN_CHECKS = 1.0


class _Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine; the strategy detects when one dies.

    Lightning's own observer would end the run by SIGKILL, without a message.

    Attributes:
        command: what the others run; None for the program that this process was started with.
        token: of the run.
    """

    command: Sequence[str] | None = None
    token = ""

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(
            num_devices=self.num_processes, num_nodes=self.num_nodes
        )
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        given = {
            "MASTER_ADDR": self.cluster_environment.main_address,
            "MASTER_PORT": str(self.cluster_environment.main_port),
            "NODE_RANK": str(self.cluster_environment.node_rank()),
            TOKEN: self.token,
        }
        self.procs = [
            Popen(
                self.command or _basic_subprocess_cmd(),
                env={**os.environ, **given, "LOCAL_RANK": str(rank)},
            )
            for rank in range(1, self.num_processes)
        ]


class IndependentPrompts(ParallelStrategy):
    """One process a device, on one or several nodes; CPU or CUDA.

    Started by itself, by torchrun, or by SLURM. All processes must see the run's folder.

    Args:
        timeout: seconds after which a silent process counts as lost.
        options: those of every Lightning strategy.
    """

    def __init__(self, timeout: float = 1800.0, **options: Any) -> None:
        super().__init__(**options)
        self.timeout = timeout
        self.num_nodes = 1
        self._store: Store | None = None
        self._calls: Counter[str] = Counter()
        self._apart = False
        self._checked_at = 0.0
        self._parent: int | None = None
        self._token = os.environ.get(TOKEN, "")

    # -- processes and devices ---------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices or ())

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = _Launcher(self.cluster_environment, self.num_processes, self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._token = self._token or secrets.token_hex(16)
            self._launcher.token = self._token

    def set_world_ranks(self) -> None:
        """Set the rank of this process wherever Lightning reads it."""
        environment = self.cluster_environment
        assert environment is not None
        environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """Connect to the store that all processes share."""
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        environment = self.cluster_environment
        assert environment is not None
        started_by_us = isinstance(environment, LightningEnvironment) and self.local_rank > 0
        self._parent = os.getppid() if started_by_us else None
        self._apart = False
        if self._store is None:
            self._store = PrefixStore(self._token, self._connect(environment))

    def _connect(self, environment: ClusterEnvironment) -> Store:
        """The store: of torchrun, of the first node where there are several, or of this machine."""
        port = environment.main_port
        if self.num_nodes > 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
            address = f"tcp://{environment.main_address}:{port}"
            store: Store = next(rendezvous(address, self.global_rank, self.world_size))[0]
            return store
        if self.global_rank > 0:
            return TCPStore(_LOOPBACK, port, self.world_size, False)
        listener = socket.create_server((_LOOPBACK, port), backlog=self.world_size)
        return TCPStore(_LOOPBACK, port, self.world_size, True, master_listen_fd=listener.detach())

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def run_by(self, command: Sequence[str]) -> None:
        """Name the command that starts the other processes of this machine."""
        assert isinstance(self._launcher, _Launcher)
        self._launcher.command = command

    # -- batches -----------------------------------------------------------------------------

    def take(self, key: str) -> bool:
        """True for the first process that takes ``key``, False for the others."""
        assert self._store is not None
        return bool(self._store.add(f"taken/{key}", 1) == 1)

    def count(self, key: str, more: int) -> int:
        """Add to a count that all processes share; the new value."""
        assert self._store is not None
        return int(self._store.add(f"count/{key}", more))

    # -- what Lightning asks of a strategy ---------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for all processes before the first batch and after the last; do nothing elsewhere.

        Raises:
            ProcessLostError: one of them ended, or has been silent for ``timeout`` seconds.
        """
        if name not in (_BEFORE_BATCHES, ROWS_ARE_WRITTEN) or self._store is None:
            return
        key = self._key(f"barrier/{name}")
        if self._store.add(key, 1) == self.world_size:
            self._store.set(f"{key}/open", "")
        self._wait(f"{key}/open")
        self._apart = True

    def broadcast(self, obj: _T, src: int = 0) -> _T:
        """The object of process ``src``; from the first batch on, each keeps its own.

        Lightning broadcasts names and flags. They travel as JSON, so that nothing that a stranger
        writes into the store is ever executed.
        """
        if self._apart or self._store is None:
            return obj
        key = self._key("broadcast")
        if self.global_rank == src:
            self._store.set(key, json.dumps(obj))
            return obj
        self._wait(key)
        received: _T = json.loads(self._store.get(key))
        return received

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """Nothing is reduced: prompts are independent."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Each process decides for itself."""
        return decision

    def all_gather(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        """Nothing is gathered: rows go to the run's file."""
        return tensor

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Each process keeps its own, beside the first one's."""
        path = checkpoint_of(str(filepath), self.global_rank)
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.check_processes()

    def on_exception(self, exception: BaseException) -> None:
        """The processes that this one started end with it."""
        for child in self._children:
            if child.poll() is None:
                child.terminate()

    # -- the others --------------------------------------------------------------------------

    def check_processes(self) -> None:
        """Record that this process is alive, and look for one of this machine that is lost.

        Raises:
            ProcessLostError: there is one, or the store is.
        """
        if self._store is None or time.monotonic() - self._checked_at < _SECONDS_BETWEEN_CHECKS:
            return
        self._checked_at = time.monotonic()
        for rank, child in enumerate(self._children, start=1):
            if child.poll():
                raise ProcessLostError(f"process {rank} ended with exit code {child.returncode}")
        if self._parent is not None and os.getppid() != self._parent:
            raise ProcessLostError("the process that started this one has ended")
        try:
            self._store.set(f"alive/{self.global_rank}", str(time.time()))
        except RuntimeError as error:
            raise ProcessLostError("the first process does not answer") from error

    def _wait(self, key: str) -> None:
        """Wait until ``key`` is there, or a process is lost."""
        assert self._store is not None
        seen: dict[int, tuple[bytes, float]] = {}
        while not self._there(key):
            self.check_processes()
            for rank in range(self.world_size):
                sign = self._store.get(f"alive/{rank}") if self._there(f"alive/{rank}") else b""
                if rank not in seen or seen[rank][0] != sign:
                    seen[rank] = (sign, time.monotonic())
                elif time.monotonic() - seen[rank][1] > self.timeout:
                    raise ProcessLostError(f"process {rank} has been silent for {self.timeout:g} s")
            time.sleep(0.05)

    def _there(self, key: str) -> bool:
        assert self._store is not None
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise ProcessLostError("the first process does not answer") from error

    def _key(self, name: str) -> str:
        """Each call of a name has a key of its own, the same in every process."""
        self._calls[name] += 1
        return f"{name}/{self._calls[name]}"

    @property
    def _children(self) -> list[Popen[bytes]]:
        return self._launcher.procs if isinstance(self._launcher, _Launcher) else []


def check_strategy(trainer: Trainer) -> None:
    """Refuse, before a model loads, what would average the inputs or split the model.

    Raises:
        InputError: the strategy is neither for one device nor ours.
    """
    if isinstance(trainer.strategy, SingleDeviceStrategy | IndependentPrompts):
        return
    kind = type(trainer.strategy).__name__
    if kind in {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}:
        raise InputError(
            f"--trainer.strategy: {kind} needs processes that step together, and prompts end at "
            f"different iterations; leave it out ({NAME} is used), and make a large model fit by "
            "--model.transformer.quantization, --model.transformer.device_map auto, or fewer "
            "blocks with --model.transformer.depth."
        )
    raise InputError(
        f"--trainer.strategy: {kind} would average the inputs of its processes; set it to {NAME}, "
        "or leave it out."
    )


def take(strategy: Strategy, key: str) -> bool:
    """Whether this process is the one to run what ``key`` names; a single one always is."""
    return strategy.take(key) if isinstance(strategy, IndependentPrompts) else True


def rank_of(trainer: Trainer) -> int:
    """Which process this is, before the Trainer has begun."""
    strategy = trainer.strategy
    if not isinstance(strategy, IndependentPrompts):
        return 0
    return strategy.node_rank * strategy.num_processes + strategy.local_rank


def checkpoint_of(path: str, rank: int) -> str:
    """``last.ckpt`` for the first process, ``last.process-1.ckpt`` for the second."""
    name = Path(path)
    return str(name.with_name(f"{name.stem}.process-{rank}{name.suffix}")) if rank else path


if NAME not in StrategyRegistry:
    StrategyRegistry.register(
        NAME, IndependentPrompts, description="shares the prompts out and averages nothing"
    )
