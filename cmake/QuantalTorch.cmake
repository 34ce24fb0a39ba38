# libtorch: the one of .venv where there is one, else whatever CMAKE_PREFIX_PATH names.
file(GLOB quantal_venv_torch
     "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch/share/cmake")
list(APPEND CMAKE_PREFIX_PATH ${quantal_venv_torch})
# The CPU wheel's config warns that it lacks kineto, a profiler's library; any other name spares it.
set(kineto_LIBRARY torch)
find_package(Torch REQUIRED)
