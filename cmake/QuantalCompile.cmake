# What every Quantal target is compiled with: C++20, hidden symbols, warnings, sanitizers, ccache.
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()

if(PROJECT_IS_TOP_LEVEL)
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
  find_program(CCACHE_PROGRAM ccache)
  if(CCACHE_PROGRAM)
    # Precompiled headers hit the cache only with these two sloppiness flags and -fpch-preprocess;
    # with the base folder, one checkout hits what another compiled.
    set(CMAKE_CXX_COMPILER_LAUNCHER
        ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros
        CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} ${CCACHE_PROGRAM})
    add_compile_options($<$<CXX_COMPILER_ID:GNU>:-fpch-preprocess>)
  endif()
endif()

add_library(quantal_compile INTERFACE)
target_compile_features(quantal_compile INTERFACE cxx_std_20)
target_compile_options(quantal_compile INTERFACE -Wall -Wextra -Wno-unused-parameter
                       -Wno-missing-field-initializers)
foreach(sanitizer IN LISTS QUANTAL_SANITIZE)
  target_compile_options(quantal_compile INTERFACE -fsanitize=${sanitizer} -fno-omit-frame-pointer)
  target_link_options(quantal_compile INTERFACE -fsanitize=${sanitizer})
endforeach()
if("undefined" IN_LIST QUANTAL_SANITIZE)
  target_compile_options(quantal_compile INTERFACE -fno-sanitize-recover=undefined)
endif()

# quantal_library(NAME SOURCES...): a shared library with hidden symbols and its alias Quantal::NAME.
function(quantal_library target alias)
  add_library(${target} SHARED ${ARGN})
  add_library(Quantal::${alias} ALIAS ${target})
  target_link_libraries(${target} PRIVATE $<BUILD_INTERFACE:quantal_compile>)
  target_compile_features(${target} PUBLIC cxx_std_20)
  target_include_directories(
    ${target} PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
                     $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
              PRIVATE ${PROJECT_SOURCE_DIR}/src)
  set_target_properties(
    ${target} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
                         EXPORT_NAME ${alias} POSITION_INDEPENDENT_CODE ON
                         INSTALL_RPATH "$ORIGIN")
  # A wheel holds no links: each name of a versioned library would be a copy of it.
  if(NOT QUANTAL_PYTHON_PACKAGE)
    set_target_properties(
      ${target} PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})
  endif()
  install(TARGETS ${target} EXPORT QuantalTargets-${alias}
          LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
endfunction()
