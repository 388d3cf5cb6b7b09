// Typesets the equations that pymdownx.arithmatex has marked. MathJax is two megabytes: only a page with an equation loads it.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], packages: { "[-]": ["autoload", "require"] } },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex", enableMenu: false },
  svg: { fontCache: "global" },
};
if (document.querySelector(".arithmatex")) {
  const script = document.createElement("script");
  script.src = new URL("mathjax/tex-svg.js", document.currentScript.src).href;
  document.head.append(script);
}
