# libtorch: for a Python package the one of the Python that builds it, else the one of .venv where
# there is one, else whatever CMAKE_PREFIX_PATH names.
if(QUANTAL_PYTHON_PACKAGE)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
    OUTPUT_VARIABLE quantal_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(quantal_torch)
    # Nothing of another torch that this build folder saw before.
    unset(TORCH_LIBRARY CACHE)
    unset(c10_LIBRARY CACHE)
    set(Torch_DIR "${quantal_torch}/share/cmake/Torch")
  elseif(NOT CMAKE_PREFIX_PATH AND NOT DEFINED ENV{CMAKE_PREFIX_PATH})
    message(FATAL_ERROR
      "Quantal is built with the torch that it will run with, and ${Python_EXECUTABLE} has none. "
      "Install torch and scikit-build-core first, then: pip install --no-build-isolation .")
  endif()
else()
  file(GLOB quantal_torch "${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch/share/cmake")
  list(APPEND CMAKE_PREFIX_PATH ${quantal_torch})
endif()
# The CPU wheel's config warns that it lacks kineto, a profiler's library; any other name spares it.
set(kineto_LIBRARY torch)
find_package(Torch REQUIRED)
