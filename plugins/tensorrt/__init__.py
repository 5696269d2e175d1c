"""The TensorRT plugins: what they take, declared once for Python and C++, and the C++ library itself."""
