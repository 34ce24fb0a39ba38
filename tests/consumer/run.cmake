# Installs Quantal afresh into WORK/prefix, then configures, builds and tests this project there.
# -D: QUANTAL_BUILD (build folder), WORK, TORCH_DIR, GENERATOR, CXX, LAUNCHER.
file(REMOVE_RECURSE ${WORK}/prefix)
execute_process(COMMAND ${CMAKE_COMMAND} --install ${QUANTAL_BUILD} --prefix ${WORK}/prefix
                OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
execute_process(
  COMMAND ${CMAKE_CTEST_COMMAND} --build-and-test ${CMAKE_CURRENT_LIST_DIR} ${WORK}/build
          --build-generator ${GENERATOR} --build-noclean
          --build-options -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH=${WORK}/prefix
                          -DTorch_DIR=${TORCH_DIR} -DCMAKE_CXX_COMPILER=${CXX}
                          "-DCMAKE_CXX_COMPILER_LAUNCHER=${LAUNCHER}"
          --test-command ${CMAKE_CTEST_COMMAND} --output-on-failure
  COMMAND_ERROR_IS_FATAL ANY)
