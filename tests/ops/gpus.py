"""GPUs that are not here, for lowering kernels to."""

import contextlib

import jax


@contextlib.contextmanager
def pretended_gpu():
    """Since jax 0.11 kernels are lowered for a named GPU: the one at hand, or an abstract one."""
    sharding = jax.sharding
    if not hasattr(sharding, "AbstractDevice") or not hasattr(sharding, "use_abstract_mesh"):
        yield
        return
    try:
        device = sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
        mesh = sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    except TypeError:
        yield
        return
    with sharding.use_abstract_mesh(mesh):
        yield
