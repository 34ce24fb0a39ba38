# find_package(Quantal): headers, libraries and the CMake files that name them.
include(CMakePackageConfigHelpers)
set(quantal_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/Quantal)
install(DIRECTORY include/quantal DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
