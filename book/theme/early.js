// Before the first paint: the reader's choice of light or dark, else what the system prefers.
try { document.documentElement.dataset.theme = localStorage.getItem("theme") || ""; } catch { /* storage is off */ }
document.documentElement.classList.add("js");
