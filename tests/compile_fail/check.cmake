# cmake -DCOMPILER=... -DINCLUDE=... -DSOURCE=... -P check.cmake
file(STRINGS ${SOURCE} expect REGEX "^// expect: ")
string(REPLACE "// expect: " "" expect "${expect}")
if(expect STREQUAL "")
  message(FATAL_ERROR "${SOURCE} has no line `// expect:`")
endif()

function(compile result output)
  execute_process(
    COMMAND ${COMPILER} -std=c++20 -fsyntax-only -I ${INCLUDE} ${ARGN} ${SOURCE}
    RESULT_VARIABLE result_value OUTPUT_VARIABLE text ERROR_VARIABLE text)
  set(${result} "${result_value}" PARENT_SCOPE)
  set(${output} "${text}" PARENT_SCOPE)
endfunction()

compile(failed output -DGDN_CONTROL)
if(failed)
  message(FATAL_ERROR "the control must compile:\n${output}")
endif()
compile(failed output)
if(NOT failed)
  message(FATAL_ERROR "this must not compile, but does")
endif()
if(NOT output MATCHES "${expect}")
  message(FATAL_ERROR "the compiler must say `${expect}`, but says:\n${output}")
endif()
