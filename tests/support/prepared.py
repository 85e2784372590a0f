"""Models as their users prepare them for training on several ranks: each takes a tiny model and a folder with it."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch

from qkov_dist.distributed.builds import locks_end
from qkov_dist.distributed.world import timeout_seconds
from qkov_dist.layout.resolve import resolve

LEAST_BYTES = 1024  # of what goes to disk


def plain(model, _folder):
    return model


def distributed_data_parallel(model, _folder):
    model.train()
    return torch.nn.parallel.DistributedDataParallel(model)


def accelerated(model, _folder):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model)


def fully_sharded(model, _folder):
    return sharded_over(model, None)


def layers_of(model):
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def sharded_over(model, mesh, **policies):
    from torch.distributed.fsdp import fully_shard

    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


def fully_sharded_half(model, _folder):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return sharded_over(model, None, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def hybrid_offloaded(model, _folder):
    from torch.distributed.fsdp import CPUOffloadPolicy

    policy = CPUOffloadPolicy(pin_memory=False)
    return sharded_over(model, mesh_of(2, 2, names=("copies", "shards")), offload_policy=policy)


def accelerated_over(model, **sizes):
    """As `Accelerator.prepare` does on GPUs, which accelerate takes its process to have."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(layers_of(model)[0]).__name__],
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, parallelism_config=ParallelismConfig(**sizes))
        return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[0]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def accelerated_sharded(model, _folder):
    return accelerated_over(model, dp_shard_size=torch.distributed.get_world_size())


def accelerated_context_parallel(model, _folder):
    return accelerated_over(model, cp_size=torch.distributed.get_world_size())


def accelerated_hybrid(model, _folder):
    return accelerated_over(model, dp_replicate_size=2, dp_shard_size=2)


def tensor_parallel(_model, folder):
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    config = DistributedConfig(tp_size=torch.distributed.get_world_size(), tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)


PROJECTIONS = {"q": "Colwise", "k": "Colwise", "v": "Colwise", "o": "Rowwise"}


def _parallelized(model, mesh, **of_output):
    from torch.distributed.tensor import parallel

    plan = {
        f"model.layers.{n}.self_attn.{name}_proj": getattr(parallel, f"{style}Parallel")(
            **(of_output if name == "o" else {})
        )
        for n in range(len(model.model.layers))
        for name, style in PROJECTIONS.items()
    }
    return parallel.parallelize_module(model, mesh, plan)


def _gathered(model, mesh):
    """Every projection of attention cut between rows, its output gathered: any model's heads will do."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    names = [f"{p.module}" for layer in resolve(model).layers for p in layer.projections]
    styles = {name: ColwiseParallel(output_layouts=Replicate()) for name in names}
    return parallelize_module(model, mesh, styles)


def torch_parallel_gathered(model, _folder):
    return _gathered(model, mesh_of(torch.distributed.get_world_size()))


def torch_parallel_hybrid(model, _folder):
    mesh = mesh_of(2, 2, 2, names=("x", "y", "z"))
    return sharded_over(_gathered(model, mesh["z"]), mesh["x", "y"])


def mesh_of(*sizes: int, names=None):
    return torch.distributed.device_mesh.init_device_mesh("cpu", sizes, mesh_dim_names=names)


def torch_parallel_tp(model, _folder):
    return _parallelized(model, mesh_of(2, names=("tp",)))


def torch_parallel_model(model, _folder):
    return _parallelized(model, mesh_of(2, names=("model",)))


def torch_parallel_nameless(model, _folder):
    return _parallelized(model, mesh_of(2))


def torch_parallel_fully_sharded(model, _folder):
    mesh = mesh_of(2, 2, names=("rows", "columns"))
    return sharded_over(_gathered(model, mesh["columns"]), mesh["rows"])


def engine_settings(stage: int, aio=None, **of_stage):
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage, **of_stage}}
    settings["zero_force_ds_cpu_optimizer"] = False
    settings["zero_allow_untested_optimizer"] = True
    return settings | ({"aio": aio} if aio else {})


def engine(model, stage: int, *, learns: bool, **of_stage):
    import deepspeed

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if learns else None
    model.requires_grad_(learns)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=engine_settings(stage, **of_stage))[0]


def zero1(model, _folder):
    return engine(model, 1, learns=True)


def zero2(model, _folder):
    return engine(model, 2, learns=True)


def zero3(model, _folder):
    return engine(model, 3, learns=False)


def zero3_with_leaves(model, _folder):
    return engine(_with_leaves(model), 3, learns=False)


def _with_leaves(model):
    """All of a layer's experts gathered at once, as the refusal says."""
    import deepspeed

    if kinds := {type(module) for name, module in model.named_modules() if name.endswith("experts")}:
        deepspeed.utils.set_z3_leaf_modules(model, [*kinds])
    return model


def zero3_offloaded(model, _folder):
    where = {"device": "cpu"}
    return engine(_with_leaves(model), 3, learns=True, offload_param=where, offload_optimizer=where)


def zero3_on_nvme(_model, folder):
    return _written_as_read(folder, learns=False)


def zero3_on_nvme_learning(_model, folder):
    return _written_as_read(folder, learns=True, offload_optimizer={"device": "cpu"})


def zero3_moved_to_nvme(model, folder):
    with _small_tensors_too():
        return engine(_with_leaves(model), 3, learns=False, **on_nvme(folder))


def _written_as_read(folder, **of_engine):
    """Each weight is written to disk as soon as it is read."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    with _small_tensors_too():
        partition = HfDeepSpeedConfig(engine_settings(3, **on_nvme(folder)))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        del partition
        return engine(_with_leaves(model), 3, **on_nvme(folder), **of_engine)


def on_nvme(folder):
    """Weights are in files, and read for each module: none is kept, none is read ahead."""
    where = {"device": "nvme", "nvme_path": f"{folder}/swapped", "buffer_size": 2**16, "max_in_cpu": 0}
    kept = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")
    return {"offload_param": where, "aio": {"block_size": LEAST_BYTES}} | {f"stage3_{name}": 0 for name in kept}


@contextlib.contextmanager
def _small_tensors_too():
    """DeepSpeed leaves tensors below a megabyte in memory."""
    from deepspeed.runtime.swap_tensor import partitioned_param_swapper

    with mock.patch.object(partitioned_param_swapper, "MIN_AIO_BYTES", LEAST_BYTES), locks_end(timeout_seconds()):
        yield


def staged(_model, folder):
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    stages = DistributedConfig(pp_size=torch.distributed.get_world_size())
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=stages)


def schedule(model, _folder):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ScheduleGPipe(PipelineStage(model, rank, size, torch.device("cpu")), 1)


@contextlib.contextmanager
def context_parallel(_model):
    """Torch's context: as it is left, attention is torch's own again."""
    from torch.distributed.tensor.experimental import context_parallel

    mesh, buffer = mesh_of(torch.distributed.get_world_size()), torch.zeros(1, 48)
    with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1]):
        yield


def attention_in_context_parallel(model, _folder):
    from torch.distributed.tensor.experimental import _attention

    kind, mesh = _attention._ContextParallel.AttentionType.SDPA, mesh_of(torch.distributed.get_world_size())
    for layer in model.model.layers:
        _attention._ContextParallel(seq_dim=2, attention_type=kind)._apply(layer.self_attn, mesh)
    return model


@contextlib.contextmanager
def ulysses(model):
    """DeepSpeed's sequence parallelism, as accelerate sets it up; transformers' attention is put back."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    deepspeed.init_distributed("gloo")
    plain, size = ALL_ATTENTION_FUNCTIONS["sdpa"], torch.distributed.get_world_size()
    try:
        UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", size, micro_batch_size=1)
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
        parallel_state_sp._SEQUENCE_PARALLEL_GROUP = parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None


def adapted_and_fully_sharded(model, folder):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)  # A of every rank alike
    kinds = [f"self_attn.{name}_proj" for name in "qkvo"]
    return fully_sharded(inject_adapter_in_model(LoraConfig(r=4, target_modules=kinds), model), folder)
