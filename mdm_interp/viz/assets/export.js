// Saving what a plot shows: as a picture, or as a table.

// Buttons for a plot's bar; `linesOf` gives the lines of its table, the header first.
function plotSaves(filename, linesOf) {
  const save = (format, title, icon, click) => ({ name: format, title, icon: Plotly.Icons[icon], click });
  return [
    save("png", "Save as PNG", "camera", (graph) => Plotly.downloadImage(graph, { format: "png", scale: 2, filename })),
    save("svg", "Save as SVG", "pencil", (graph) => Plotly.downloadImage(graph, { format: "svg", filename })),
    save("csv", "Save as CSV", "disk", (graph) => download(`${filename}.csv`, csvBlob(linesOf(graph)))),
  ];
}

function csvBlob(lines) {
  const quoted = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ""));
  return new Blob([lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n"], { type: "text/csv" });
}

function download(filename, blob) {
  const link = Object.assign(document.createElement("a"), { download: filename, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
