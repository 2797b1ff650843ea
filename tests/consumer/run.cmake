# cmake -DBUILD=<hymoe's build> -DWORK=<folder> -DLIBTORCH=<folder> -DCXX=<compiler> -P run.cmake
# Installs hymoe, builds this project against what was installed, and runs it and the installed program.
function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE "${WORK}")
run("${CMAKE_COMMAND}" --install "${BUILD}" --prefix "${WORK}/prefix")
run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -B "${WORK}/build" -G Ninja -DCMAKE_BUILD_TYPE=Release
  "-DCMAKE_CXX_COMPILER=${CXX}" "-DCMAKE_PREFIX_PATH=${WORK}/prefix" "-DLibTorch_ROOT=${LIBTORCH}")
run("${CMAKE_COMMAND}" --build "${WORK}/build")
run("${WORK}/build/consumer")
run("${WORK}/build/readme_1")
if(EXISTS "${WORK}/prefix/bin/hymoe")
  run("${WORK}/prefix/bin/hymoe" --version)
endif()
file(REMOVE_RECURSE "${WORK}")
