"""TensorRT engines, of TensorRT-RTX or of TensorRT: lower, build in a process of its own, check before loading."""

from planish.compiler.backends.tensorrt.build import DEFAULT_SMS, EngineBuild, build_engines
from planish.compiler.backends.tensorrt.check import check_engine
from planish.compiler.backends.tensorrt.engine_json import EngineRecord

__all__ = ["DEFAULT_SMS", "EngineBuild", "EngineRecord", "build_engines", "check_engine"]
