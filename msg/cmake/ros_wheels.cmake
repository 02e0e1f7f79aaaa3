# For ROS 2 from Python wheels; changes nothing elsewhere. The wheels' exported targets name the Python
# include folder of the machine that built them, /opt/python/..., which CMake refuses when it does not exist here. It is taken off
# the imported targets after the project's find_package calls, so the installed wheels stay as pip left them.
function(_ros_wheels_drop_builder_python)
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  foreach(target IN LISTS targets)
    get_target_property(folders ${target} INTERFACE_INCLUDE_DIRECTORIES)
    if(folders MATCHES "/opt/python/")
      list(FILTER folders EXCLUDE REGEX "^/opt/python/")
      set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${folders}")
    endif()
  endforeach()
endfunction()
cmake_language(DEFER CALL _ros_wheels_drop_builder_python)
