// Before anything is drawn: the theme that was chosen here, else that of the system.
const theme = localStorage.getItem("onecard.theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
