"""OpenVINO itself, on the processor or on another of its devices, as ``openvino:GPU``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from convrewrite.errors import UsageError
from convrewrite.machine import channel_block
from convrewrite.signal_stacks import signal_stack_kept
from convrewrite.targets.target import Compiled, OnnxTarget, Program, array_of, name_of, opened, source_of

UNCONVERTED = re.compile(r"No conversion rule found for operations: *(.+)")
"""Pattern of the sentence in which OpenVINO lists the operators that it lacks."""

INLINE = "a function of the file, which onnx.inliner.inline_local_functions writes out"
"""What to do about an operator that is none of ONNX."""


@dataclass(frozen=True, slots=True)
class OpenVino(OnnxTarget):
    """OpenVINO in float32: on processors with bfloat16 units it would otherwise round to these, and parity would be lost."""

    package: ClassVar[str] = "openvino"

    @property
    def name(self) -> str:
        """``openvino``, or with the device after a colon."""
        return name_of("openvino", self.option)

    def version(self) -> str:
        """Raises UsageError for a device that is not there."""
        import openvino as ov

        if self.option:
            there = ov.Core().available_devices
            if self.option.split(".")[0].upper() not in {device.split(".")[0].upper() for device in there}:
                raise UsageError(
                    f"--runtime {self.name}: expected a device that OpenVINO finds here ({', '.join(there)})"
                )
        return str(ov.__version__).split("-")[0]

    def block(self) -> int:
        """That of oneDNN's blocked layouts on the processor."""
        return channel_block()

    def lacks(self, program: Program) -> tuple[str, ...]:
        """The operators that it names when it cannot convert the file; of functions, which it never has, how to do without."""
        import openvino as ov

        try:
            ov.Core().read_model(source_of(program))
        except RuntimeError as error:
            named = UNCONVERTED.search(str(error))
            names = re.split(r",\s*", named[1].strip()) if named else []
            functions = {function.name for function in opened(source_of(program)).functions}
            found = sorted({name.rpartition(".")[2] for name in names})
            return tuple(f"{name} ({INLINE})" if name in functions else name for name in found)
        return ()

    def compile(self, program: Program, inputs: Sequence[Any], threads: int) -> Compiled:
        """A request whose inputs are set once; at one thread it runs in the calling one."""
        import openvino as ov

        core = ov.Core()
        model = core.read_model(source_of(program))
        model.reshape({port: list(array_of(value).shape) for port, value in zip(model.inputs, inputs, strict=True)})
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        device = self.option.upper() or "CPU"
        if device.split(".")[0] == "CPU":  # also when it was asked for by name
            settings |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
        with signal_stack_kept():
            request = core.compile_model(model, device, settings).create_infer_request()
        for index, value in enumerate(inputs):
            request.set_input_tensor(index, ov.Tensor(array_of(value).copy()))
        outputs = range(len(model.outputs))

        def run() -> Sequence[Any]:
            with signal_stack_kept():
                request.infer()
            return [request.get_output_tensor(index).data for index in outputs]

        return run


TARGET = OpenVino
