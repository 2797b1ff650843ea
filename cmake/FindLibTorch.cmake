# LibTorch as one imported target, LibTorch::LibTorch, from a LibTorch archive or a Python wheel.
#
# Torch's own package files demand a CUDA toolkit whenever LibTorch was built with CUDA, which most machines with the
# plain wheel do not have; the headers and libraries alone are enough for us. Search order: LibTorch_ROOT, Torch_DIR,
# CMAKE_PREFIX_PATH (a LibTorch folder, or what torch.utils.cmake_prefix_path prints).
set(_hints)
foreach(_p IN LISTS LibTorch_ROOT Torch_DIR CMAKE_PREFIX_PATH)
  list(APPEND _hints "${_p}" "${_p}/.." "${_p}/../.." "${_p}/../../..")
endforeach()
find_path(LibTorch_INCLUDE_DIR torch/csrc/autograd/custom_function.h HINTS ${_hints} PATH_SUFFIXES include)
get_filename_component(_root "${LibTorch_INCLUDE_DIR}" DIRECTORY)
foreach(_lib torch torch_cpu c10)
  find_library(LibTorch_${_lib}_LIBRARY ${_lib} HINTS "${_root}/lib" NO_DEFAULT_PATH)
endforeach()
find_library(LibTorch_cuda_LIBRARY torch_cuda HINTS "${_root}/lib" NO_DEFAULT_PATH)
find_library(LibTorch_c10_cuda_LIBRARY c10_cuda HINTS "${_root}/lib" NO_DEFAULT_PATH)
if(LibTorch_INCLUDE_DIR AND EXISTS "${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h")
  file(STRINGS "${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h" _v REGEX "#define TORCH_VERSION_M(AJOR|INOR) ")
  string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*" "\\1.\\2" LibTorch_VERSION "${_v}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(LibTorch
  REQUIRED_VARS LibTorch_torch_LIBRARY LibTorch_torch_cpu_LIBRARY LibTorch_c10_LIBRARY LibTorch_INCLUDE_DIR
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "name a LibTorch folder, or what torch.utils.cmake_prefix_path is in Python, with -DCMAKE_PREFIX_PATH")

set(LibTorch_CUDA FALSE)
if(LibTorch_cuda_LIBRARY AND NOT HYMOE_CUDA STREQUAL "OFF")
  set(LibTorch_CUDA TRUE)
elseif(HYMOE_CUDA STREQUAL "ON")
  message(FATAL_ERROR "HYMOE_CUDA=ON, but the LibTorch in ${_root} has no libtorch_cuda")
endif()

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  target_include_directories(LibTorch::LibTorch SYSTEM INTERFACE
    "${LibTorch_INCLUDE_DIR}" "${LibTorch_INCLUDE_DIR}/torch/csrc/api/include")
  target_link_libraries(LibTorch::LibTorch INTERFACE
    "${LibTorch_torch_LIBRARY}" "${LibTorch_torch_cpu_LIBRARY}" "${LibTorch_c10_LIBRARY}")
  if(LibTorch_CUDA)
    # Nothing names a symbol of these: the linker would drop them, and with them the CUDA backend.
    target_link_libraries(LibTorch::LibTorch INTERFACE
      "-Wl,--push-state,--no-as-needed" "${LibTorch_cuda_LIBRARY}" "${LibTorch_c10_cuda_LIBRARY}" "-Wl,--pop-state")
  endif()
endif()
mark_as_advanced(LibTorch_INCLUDE_DIR)
