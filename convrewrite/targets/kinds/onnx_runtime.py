"""onnxruntime: on the processor, or by another execution provider of the installed build, as ``onnxruntime:cuda``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from convrewrite.errors import UsageError
from convrewrite.machine import channel_block
from convrewrite.targets.target import Compiled, OnnxTarget, Program, array_of, name_of, opened, source_of

PROVIDERS = {
    "cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider", "openvino": "OpenVINOExecutionProvider", "directml": "DmlExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider", "qnn": "QNNExecutionProvider",
}  # fmt: skip
"""Execution providers by the option that asks for them."""

ON_PROCESSOR = ("CPUExecutionProvider",)

ACCELERATOR_BLOCK = 8
"""Fewest channels that matrix units of accelerators take at a time, in half precision."""


def session_options(threads: int) -> Any:
    """All graph optimisations on. Threads do not spin while they wait: spinning threads of one session slow down another that
    is being timed."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options


@dataclass(frozen=True, slots=True)
class OnnxRuntime(OnnxTarget):
    """onnxruntime with one execution provider; onnxruntime itself runs what that cannot do on the processor."""

    package: ClassVar[str] = "onnxruntime"

    @property
    def name(self) -> str:
        """``onnxruntime``, or with the provider after a colon."""
        return name_of("onnxruntime", self.option)

    def version(self) -> str:
        """Raises UsageError for a provider that the installed build does not have."""
        import onnxruntime as ort

        if self.option:
            there = ort.get_available_providers()
            known = [option for option, provider in PROVIDERS.items() if provider in there]
            if self.option not in known:
                raise UsageError(
                    f"--runtime {self.name}: expected a provider that the installed onnxruntime has ({', '.join(known)}); "
                    "install a build with it, as onnxruntime-gpu for cuda and tensorrt, onnxruntime-openvino for openvino"
                )
        return str(ort.__version__)

    def block(self) -> int:
        """On the processor that of the NCHWc layout."""
        return channel_block() if self.option in ("", "cpu", "openvino", "xnnpack") else ACCELERATOR_BLOCK

    def lacks(self, program: Program) -> tuple[str, ...]:
        """Operators that neither the provider nor the processor has a kernel for; functions of other operators are not
        counted."""
        import onnx
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        model = opened(source_of(program))
        kernels = {kernel.op_name for kernel in state.get_all_opkernel_def()}
        asked = {node.op_type for node in model.graph.node if not onnx.defs.has(node.op_type, node.domain)}
        return tuple(sorted(asked - kernels))

    def compile(self, program: Program, inputs: Sequence[Any], threads: int) -> Compiled:
        """A session, and its inputs in order. Raises RuntimeError where the provider does not load: a build has it also where its
        libraries are missing, and onnxruntime would run everything on the processor and say nothing."""
        import onnxruntime as ort

        source = source_of(program)
        providers = [PROVIDERS[self.option], *ON_PROCESSOR] if self.option not in ("", "cpu") else list(ON_PROCESSOR)
        session = ort.InferenceSession(
            source if isinstance(source, bytes) else str(source),
            session_options(threads),
            providers=providers,
            enable_fallback=0,
        )
        if providers[0] not in session.get_providers():
            raise RuntimeError(
                f"expected {providers[0]} to load, found that it does not here; see that its libraries are installed"
            )
        names = [entry.name for entry in session.get_inputs()]
        feed = {name: array_of(value) for name, value in zip(names, inputs, strict=True)}
        return lambda: session.run(None, feed)


TARGET = OnnxRuntime
