// Lets a build by a newer g++ run where only manylinux_2_28's libstdc++ and glibc are. Newer
// headers refer to a flag of newer C libraries and to string streams that newer libstdc++ versions
// export; both are provided here, hidden.
#include <sstream>

extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;  // "there may be threads" is always safe

template class std::basic_stringstream<char>;
template class std::basic_istringstream<char>;
template class std::basic_ostringstream<char>;
