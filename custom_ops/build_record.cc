// What this library was built for, as text in its file: Python reads and compares it before it loads the
// library.
[[gnu::used]] static const char kBuildRecord[] = VLSP_BUILD;
