# find_package(Quantal): headers, libraries and the CMake files that name them. An export set a
# library, so that who uses the kernels alone needs no libtorch.
include(CMakePackageConfigHelpers)
set(quantal_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/Quantal)
install(DIRECTORY include/quantal DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

set(quantal_installed kernels io)
if(QUANTAL_BUILD_TORCH)
  list(APPEND quantal_installed quantal)
endif()
foreach(alias IN LISTS quantal_installed)
  install(EXPORT QuantalTargets-${alias} NAMESPACE Quantal:: DESTINATION ${quantal_cmake_dir})
endforeach()

configure_package_config_file(
  cmake/QuantalConfig.cmake.in QuantalConfig.cmake INSTALL_DESTINATION ${quantal_cmake_dir})
write_basic_package_version_file(QuantalConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/QuantalConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/QuantalConfigVersion.cmake
        DESTINATION ${quantal_cmake_dir})

# What the Python package must know of its build.
if(QUANTAL_PYTHON_PACKAGE)
  configure_file(cmake/_build.py.in _build.py @ONLY)
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/_build.py DESTINATION .)
endif()
