// Buttons are called what they show; a list has no children but its items.
addEventListener("load", () => {
  for (const button of document.querySelectorAll(".theme-switch-button")) {
    const hush = () => {
      for (const icon of button.querySelectorAll("svg")) {
        icon.removeAttribute("role");
        icon.querySelector("title")?.remove();
      }
    };
    hush();
    new MutationObserver(hush).observe(button, { childList: true, subtree: true });
  }
  for (const button of document.querySelectorAll(".search-button-field")) {
    button.setAttribute("aria-label", button.textContent.replace(/\s+/g, " ").trim());
  }
  for (const summary of document.querySelectorAll("summary[aria-label]")) {
    summary.removeAttribute("aria-label");
  }
  for (const list of document.querySelectorAll(".citation-list")) {
    list.removeAttribute("role");
  }
});
